"""Files of models and runs: Hugging Face layout in and out, and run states saved beside training and loaded anywhere.

A checkpoint is a directory of safetensors, one for each process, and a manifest that names every piece of every tensor
and hashes every file, itself included. Directories are written under another name, fsynced and renamed, so what has its
final name is whole. Nothing is unpickled.
"""

import errno
import hashlib
import json
import math
import os
import queue
import re
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, PyTree
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open

from lacuna.attention import choose_backend
from lacuna.config import ModelKeys, UserError
from lacuna.distributed import AXIS_RULES, check_divisible, from_first, is_first, to_first
from lacuna.metrics import byte_size, duration
from lacuna.model import ModelConfig, Parameter, parameter_table, partition_spec, read_model_config, shape_of
from lacuna.tokenizer import Tokenizer, load_tokenizer

DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int32": "I32"}  # ours, in a file's header
FILE_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
SHARD_BYTES = 5 * 10**9
LISTED = 10
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "generation_config.json",
)


def resolve_model(model_name: str, with_weights: bool = True) -> Path:
    """The directory of a model: a local one, the model of one of our runs, or a hub id, fetched into the hub's cache.

    Raises:
        UserError: no such directory, and no such hub model or no way to it.
    """
    path = Path(model_name)
    if (path / "model" / "config.json").is_file():
        return path / "model"
    if (path / "manifest.json").is_file():
        raise UserError(f"{path}: a checkpoint to resume from, not a model; a run exports its model when it ends")
    if (path / "config.toml").is_file():
        raise UserError(f"{path}: a run that has not ended, so it has no model yet; go on with it by --resume")
    if path.is_dir():
        return path
    import huggingface_hub
    from huggingface_hub import errors

    wanted = ["config.json", *TOKENIZER_FILES]
    if with_weights:
        wanted += ["model*.safetensors", "model.safetensors.index.json"]
    try:
        return Path(huggingface_hub.snapshot_download(model_name, allow_patterns=wanted, ignore_patterns="*/*"))
    except Exception as error:  # its HTTP and storage clients raise kinds of their own
        match error:
            case errors.HFValidationError():
                reason = "no such directory, and not a hub id such as Qwen/Qwen2.5-0.5B"
            case errors.GatedRepoError():
                reason = "access is restricted; accept its terms on its page on the hub, log in with `hf auth login`"
            case errors.RepositoryNotFoundError():
                reason = "no such directory, and no such model on the hub (a private one needs `hf auth login`)"
            case errors.LocalEntryNotFoundError():
                cause = error.__cause__ or error
                reason = f"no such directory, not whole in the hub's cache, and the hub can't be asked ({cause})"
            case _:
                reason = f"the download failed ({error}); that mended, the same command fetches what is missing"
        raise UserError(f"model_name {model_name!r}: {' '.join(reason.split())}") from error


def newest_run(output_dir: str) -> Path:
    """The run in this folder whose model was written last. Raises UserError where there is none."""
    exported = sorted(Path(output_dir).glob("*/model/config.json"), key=lambda path: path.stat().st_mtime)
    if not exported:
        raise UserError(f"{output_dir}: no run with a model in it; give --model-name, or train one first")
    return exported[-1].parents[1]


class OpenedModel(NamedTuple):
    """All of a model but its weights: its directory, what config.json says, with the vocabulary padded and attention
    chosen for the mesh, its tokenizer, the devices, and the start-up line on attention."""

    source: Path
    model: ModelConfig
    tokenizer: Tokenizer
    mesh: Mesh
    attention_line: str


def open_model(config: ModelKeys, mesh: Mesh, *template: str, with_weights: bool = True) -> OpenedModel:
    """The model of a config on a mesh, each part checked against the others; `template` is as for `load_tokenizer`.

    Raises:
        UserError: no such model, or one that is not supported, or does not fit the mesh or the config.
    """
    source = resolve_model(config.model_name, with_weights)
    model, attention_line = model_on(source, config, mesh)
    tokenizer = load_tokenizer(source, *template)
    if tokenizer.vocabulary_size > model.vocabulary_size:
        raise UserError(
            f"{source}: the tokenizer has {tokenizer.vocabulary_size} tokens, config.json's vocab_size is "
            f"{model.vocabulary_size}; do they belong together?"
        )
    return OpenedModel(source, model, tokenizer, mesh, attention_line)


def model_on(source: Path, config: ModelKeys, mesh: Mesh) -> tuple[ModelConfig, str]:
    """The model of a directory, its vocabulary padded and its attention chosen for the mesh, and a line on the latter.

    Raises:
        UserError: the model is not supported, or does not fit the mesh or the page.
    """
    model = read_model_config(source)
    shards = mesh.shape[AXIS_RULES["vocab"]]
    backend, line = choose_backend(config, mesh, model.head)
    model = replace(model, padded_vocabulary=-(-model.vocabulary_size // shards) * shards, attention=backend)
    check_divisible(mesh, model.sizes)
    return model, line


class FileTensor(NamedTuple):
    """A tensor in a safetensors file: its shape and a way to read a slice of it."""

    shape: tuple[int, ...]
    read: Callable[[tuple[slice, ...]], np.ndarray]


def open_tensors(directory: Path, stack: ExitStack) -> dict[str, FileTensor]:
    """Every tensor of a model's safetensors files, single or sharded with an index, by name."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{index}: no index of safetensors files ({error!r}); fetch the file again") from error
        if outside := [name for name in names if Path(name).name != name]:
            raise UserError(f"{index}: names the file {outside[0]!r}, which is not in the same directory")
    else:
        names = ["model.safetensors"]
    tensors: dict[str, FileTensor] = {}
    for name in names:
        path = directory / name
        if not path.is_file():
            raise UserError(f"{path}: no such file; {missing_weights(directory)}")
        try:
            file = stack.enter_context(safe_open(path, "numpy"))
        except SafetensorError as error:
            raise UserError(f"{path}: damaged or not safetensors ({error}); fetch the file again") from error
        for key in file.keys():
            part = file.get_slice(key)
            tensors[key] = FileTensor(tuple(part.get_shape()), part.__getitem__)
    return tensors


def missing_weights(directory: Path) -> str:
    """What to do where there are no safetensors."""
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")) or any(directory.glob("*.pth")):
        loader = f"transformers' AutoModelForCausalLM.from_pretrained({str(directory)!r}).save_pretrained(…)"
        return f"pickled weights are never read, convert them by {loader}"
    return "to train from random weights, add --from-scratch"


def load_params(directory: Path, model: ModelConfig, mesh: Mesh) -> PyTree[Array]:
    """Float32 weights from `directory`, each device reading only what it holds.

    Raises:
        UserError: no weights, or tensors that are missing, unknown or of another shape (the first ten of each).
    """
    table = parameter_table(model)
    with ExitStack() as stack:
        tensors = open_tensors(directory, stack)
        check_tensors(directory, model, tensors)
        return jax.tree.map(lambda row: load_parameter(row, tensors, model, mesh), table)


def check_tensors(directory: Path, model: ModelConfig, tensors: Mapping[str, FileTensor]) -> None:
    wanted = {
        name: file_shape(row, model)
        for row in jax.tree.leaves(parameter_table(model))
        for name in file_names(row, model)
    }
    # A tied model's file may repeat the embedding as its head; old files hold the rotary table.
    extra = [name for name in tensors if name not in wanted and not name.endswith("rotary_emb.inv_freq")]
    if model.is_tied:
        extra = [name for name in extra if name != "lm_head.weight"]
    wrong = [f"{name} is missing (the config wants {shape})" for name, shape in wanted.items() if name not in tensors]
    wrong += [
        f"{name} has shape {tensors[name].shape}, the config wants {shape}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    wrong += [f"{name} of shape {tensors[name].shape} is not in the config's model" for name in extra]
    if wrong:
        listed = "\n  ".join(wrong[:LISTED] + ([f"… and {len(wrong) - LISTED} more"] if len(wrong) > LISTED else []))
        raise UserError(f"{directory}: the weights do not fit config.json; do they belong together?\n  {listed}")


def file_names(row: Parameter, model: ModelConfig) -> list[str]:
    """Names of a row's tensors in the file, one a layer where it has layers."""
    if not row.axes.startswith("layer "):
        return [row.file_name]
    return [row.file_name.format(layer=layer) for layer in range(model.layers)]


def file_shape(row: Parameter, model: ModelConfig) -> tuple[int, ...]:
    """Shape of one of a row's tensors in the file, where the vocabulary is not padded."""
    sizes = model.sizes | {"vocab": model.vocabulary_size}
    return tuple(math.prod(sizes[axis] for axis in merged.split("*")) for merged in row.file_axes.split())


def load_parameter(row: Parameter, tensors: Mapping[str, FileTensor], model: ModelConfig, mesh: Mesh) -> Array:
    """One weight over the mesh; each shard's part of each file tensor is read, split into axes and transposed."""
    axes = row.axes.split()
    has_layers = axes[0] == "layer"
    memory_axes = axes[1:] if has_layers else axes
    file_order = [axis for merged in row.file_axes.split() for axis in merged.split("*")]
    names = file_names(row, model)

    def shard(index: Any) -> np.ndarray:
        bounds = {axis: part.indices(model.sizes[axis])[:2] for axis, part in zip(axes, index, strict=True)}
        layers = names[slice(*bounds["layer"])] if has_layers else names
        parts = [
            read_part(tensors[name], row, model, bounds, file_order).transpose(
                [file_order.index(axis) for axis in memory_axes]
            )
            for name in layers
        ]
        return np.stack(parts) if has_layers else np.ascontiguousarray(parts[0])

    sharding = NamedSharding(mesh, partition_spec(row))
    return jax.make_array_from_callback(shape_of(row, model.sizes), sharding, shard)


def read_part(
    tensor: FileTensor,
    row: Parameter,
    model: ModelConfig,
    bounds: Mapping[str, tuple[int, int]],
    file_order: list[str],
) -> np.ndarray:
    """The float32 part of a file tensor within `bounds`, its merged axes apart, zeros where the vocabulary is padded.

    Of merged axes only the first may be cut, which keeps what is read in one piece.
    """
    slices, padding = [], [(0, 0)] * len(file_order)
    for merged in row.file_axes.split():
        first, *inner = merged.split("*")
        size = math.prod(model.sizes[axis] for axis in inner)
        begin, end = bounds[first]
        if first == "vocab":
            known = max(begin, min(end, model.vocabulary_size))
            padding[file_order.index("vocab")] = (0, end - known)
            end = known
        slices.append(slice(begin * size, end * size))
    part = np.asarray(tensor.read(tuple(slices))).astype(np.float32)
    lengths = [bounds[axis][1] - bounds[axis][0] - padding[number][1] for number, axis in enumerate(file_order)]
    return np.pad(part.reshape(lengths), padding)


def save_model(directory: Path, params: PyTree, model: ModelConfig, source: Path, chat_template: str = "") -> None:
    """Write a model in Hugging Face layout, with the config and tokenizer files of `source`, in the config's dtype.

    A `chat_template` file given in place of the source's own goes along. Safetensors of at most 5 GB each, with an
    index where there are several; `params`, arrays or tensors of a checkpoint, are read layer by layer.
    """
    scratch = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        write_model(scratch, params, model)
        for name in ("config.json", *TOKENIZER_FILES):
            if (source / name).is_file():
                shutil.copyfile(source / name, scratch / name)
        if chat_template:
            shutil.copyfile(chat_template, scratch / "chat_template.jinja")
        for path in (*scratch.iterdir(), scratch):
            sync(path)
    except OSError:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    replace_directory(scratch, directory)


def write_model(scratch: Path, params: PyTree, model: ModelConfig) -> None:
    """The weights alone, in as many files as their size asks for."""
    dtype = np.dtype(FILE_DTYPES[model.file_dtype])
    leaf_of = dict(zip(jax.tree.leaves(parameter_table(model)), jax.tree.leaves(params), strict=True))
    shards: list[dict[str, tuple[Parameter, int]]] = [{}]
    room = SHARD_BYTES
    for row in leaf_of:
        size = math.prod(file_shape(row, model)) * dtype.itemsize
        for layer, name in enumerate(file_names(row, model)):
            if size > room and shards[-1]:
                shards.append({})
                room = SHARD_BYTES
            shards[-1][name] = row, layer
            room -= size
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        shapes = {name: (dtype, file_shape(row, model)) for name, (row, _) in shard.items()}
        parts = (file_tensor(leaf_of[row], row, layer, model, dtype) for row, layer in shard.values())
        write_safetensors(scratch / file, shapes, parts, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(math.prod(file_shape(row, model)) for shard in shards for row, _ in shard.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (scratch / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def file_tensor(leaf: Any, row: Parameter, layer: int, model: ModelConfig, dtype: Any) -> np.ndarray:
    """One tensor of the file from a weight in memory: its layer, transposed and merged back, the padding off."""
    axes = row.axes.split()
    if axes[0] == "layer":
        leaf, axes = leaf[layer], axes[1:]
    file_order = [axis for merged in row.file_axes.split() for axis in merged.split("*")]
    whole = np.asarray(leaf).transpose([axes.index(axis) for axis in file_order])
    if axes[0] == "vocab":
        whole = whole[: model.vocabulary_size]
    return np.ascontiguousarray(whole.reshape(file_shape(row, model)).astype(dtype))


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    tensors: Iterable[np.ndarray],
    metadata: Mapping[str, str],
) -> tuple[int, str]:
    """Write and fsync tensors one by one in the order of `shapes`; the file's size and SHA-256, made on the way.

    The library's own writer wants a second copy of all tensors in memory and holds up every other thread meanwhile.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype.name], "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(part: bytes | memoryview) -> None:
            file.write(part)
            digest.update(part)

        write(len(text).to_bytes(8, "little"))
        write(text)
        for (dtype, shape), tensor in zip(shapes.values(), tensors, strict=True):
            assert tensor.dtype == dtype and tensor.shape == shape
            write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
        return file.tell(), digest.hexdigest()


def sync(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_directory(scratch: Path, directory: Path) -> None:
    """Give a finished directory its final name, in place of what stood there."""
    old = directory.with_name(directory.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        os.rename(directory, old)
    os.rename(scratch, directory)
    sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


MANIFEST_FORMAT = 3
FAILURES_IN_A_ROW = 3
PICKLED = (".bin", ".pt", ".pth", ".ckpt")


class Record(BaseModel):
    """A part of a manifest: of these fields exactly, and never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Piece(Record):
    """A box of a tensor: the file and key that hold it, its first index on each axis and its shape."""

    file: str
    key: str
    begin: tuple[int, ...]
    shape: tuple[int, ...]


class TensorRecord(Record):
    """A tensor and the pieces that tile it."""

    shape: tuple[int, ...]
    dtype: Literal["float32", "int32"]
    pieces: tuple[Piece, ...]


class FileRecord(Record):
    """A file's size and hash."""

    bytes: int
    sha256: str


class RunFacts(Record):
    """What a run needs besides its state to resume, and what must not have changed by then.

    `best` is the best held-out loss of pretrain and sft so far, or grpo's best held-out reward.
    """

    step: int
    best: float | None
    wall_seconds: float
    config: dict[str, Any]
    model: dict[str, Any]
    data: tuple[str, ...]
    versions: dict[str, str]


class Manifest(Record):
    """What a checkpoint consists of."""

    format: int
    run: RunFacts
    files: dict[str, FileRecord]
    tensors: dict[str, TensorRecord]


class Report(Record):
    """What one process wrote: its file and the pieces in it, by tensor; or why it could not."""

    file: FileRecord | None
    pieces: dict[str, tuple[Piece, ...]]
    error: str = ""


# Saving


class Saver:
    """Saves a run's state: training waits only for the copy off the devices, a thread writes and commits.

    `session` tells apart what different starts of a run leave unfinished.
    """

    def __init__(self, run_directory: Path, keep: int, session: str) -> None:
        self.run_directory, self.keep, self.session = run_directory, keep, session
        self.newest: Path | None = None
        self.failures = 0
        self.outcomes: queue.SimpleQueue[str | BaseException] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None

    def save(self, state: PyTree[Array], shapes: PyTree, facts: RunFacts, is_best: bool) -> float:
        """Begin to save; the seconds for which this held up the caller.

        `shapes` are those to be saved, without the rows that pad the vocabulary in memory.
        """
        began = time.perf_counter()
        self.wait()
        pieces = copied_pieces(state, shapes)
        self.thread = threading.Thread(target=self.write, args=(pieces, shapes, facts, is_best, began), daemon=True)
        self.thread.start()
        return time.perf_counter() - began

    def write(self, pieces: "list[PieceData]", shapes: PyTree, facts: RunFacts, is_best: bool, began: float) -> None:
        """Write this process's pieces, and when all have, let the first process commit; the thread's whole life."""
        try:
            directory = checkpoint_directory(self.run_directory, facts.step)
            scratch = directory.with_name(f"{directory.name}.{self.session}.tmp")
            needed = sum(leaf.dtype.itemsize * leaf.size for leaf in jax.tree.leaves(shapes))
            report = write_pieces(scratch, pieces, needed)
            texts = to_first(f"save {facts.step}", report.model_dump_json())
            reports, problem = [Report.model_validate_json(text) for text in texts], ""
            if is_first():
                problem = next((report.error for report in reports if report.error), "")
                problem = problem or self.commit(scratch, directory, reports, shapes, facts, is_best)
                if problem:
                    shutil.rmtree(scratch, ignore_errors=True)
            problem = from_first(f"commit {facts.step}", problem)
            if problem:
                self.failures += 1
                raise SaveFailed(f"step {facts.step} could not be saved: {problem}")
            self.failures, self.newest = 0, directory
            best = ", the best so far" if is_best else ""
            self.outcomes.put(
                f"saved {directory}{best} ({byte_size(needed)} in {duration(time.perf_counter() - began)})"
            )
        except BaseException as error:
            self.outcomes.put(error)

    def commit(
        self,
        scratch: Path,
        directory: Path,
        reports: Sequence[Report],
        shapes: PyTree,
        facts: RunFacts,
        is_best: bool,
    ) -> str:
        """Write the manifest, give the checkpoint its name, remove what is no longer kept; what went wrong."""
        tensors = {
            name: TensorRecord(
                shape=leaf.shape,
                dtype=leaf.dtype.name,
                pieces=tuple(piece for report in reports for piece in report.pieces.get(name, ())),
            )
            for name, leaf in named_leaves(shapes)
        }
        files = {shard_name(process): report.file for process, report in enumerate(reports) if report.file}
        try:
            write_manifest(scratch, Manifest(format=MANIFEST_FORMAT, run=facts, files=files, tensors=tensors))
            replace_directory(scratch, directory)
            if is_best:
                mark_best(self.run_directory, directory)
            remove_old(self.run_directory, self.keep)
        except OSError as error:
            return describe_error(error)
        return ""

    def news(self) -> Iterator[str]:
        """Lines on the saves that have ended since the last call.

        Raises:
            UserError: the third save in a row has failed.
        """
        while not self.outcomes.empty():
            outcome = self.outcomes.get()
            if not isinstance(outcome, BaseException):
                yield outcome
            elif not isinstance(outcome, SaveFailed):
                raise outcome
            elif self.failures >= FAILURES_IN_A_ROW:
                raise UserError(f"{outcome}; {self.failures} saves in a row failed: make room and add --resume")
            else:
                yield f"WARNING: {outcome}; training goes on and the next save tries again ({self.failures} in a row)"

    def wait(self) -> None:
        """Wait until the last save has ended, well or not."""
        if self.thread:
            self.thread.join()

    @contextmanager
    def finishing(self) -> Generator[None]:
        """Let a save that is under way end when an error ends the run, but not when a user leaves at once."""
        try:
            yield
        except Exception:
            self.wait()
            raise


class SaveFailed(Exception):
    """A save that came to nothing, through no fault of the program."""


class PieceData(NamedTuple):
    """A piece of a tensor on the host, on its way to a file."""

    name: str
    begin: tuple[int, ...]
    values: np.ndarray


def copied_pieces(state: PyTree[Array], shapes: PyTree) -> list[PieceData]:
    """Copies of the parts of the state that this process is to write, each part of it written by one process alone."""
    leaves, shapes = named_leaves(state), [leaf.shape for leaf in jax.tree.leaves(shapes)]
    for _, leaf in leaves:
        leaf.copy_to_host_async()
    pieces = []
    for (name, leaf), shape in zip(leaves, shapes, strict=True):
        for shard in leaf.addressable_shards:
            begin = tuple(part.indices(size)[0] for part, size in zip(shard.index, leaf.shape, strict=True))
            inside = tuple(slice(max(size - first, 0)) for size, first in zip(shape, begin, strict=True))
            values = np.asarray(shard.data)[inside]
            if shard.replica_id == 0 and values.size:
                pieces.append(PieceData(name, begin, values.copy()))
    return pieces


def write_pieces(scratch: Path, pieces: Sequence[PieceData], needed: int) -> Report:
    """This process's file within `scratch`, where `needed` bytes are to find room in all."""
    keys = [f"{name}@{','.join(map(str, begin))}" for name, begin, _ in pieces]
    path = scratch / shard_name(jax.process_index())
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(scratch).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"{byte_size(needed)} are needed, {byte_size(free)} are free", str(path))
        shapes = {key: (values.dtype, values.shape) for key, (*_, values) in zip(keys, pieces, strict=True)}
        size, sha256 = write_safetensors(path, shapes, (values for *_, values in pieces), {"format": "np"})
    except OSError as error:
        path.unlink(missing_ok=True)
        return Report(file=None, pieces={}, error=describe_error(error))
    described: dict[str, tuple[Piece, ...]] = {}
    for key, (name, begin, values) in zip(keys, pieces, strict=True):
        piece = Piece(file=path.name, key=key, begin=begin, shape=values.shape)
        described[name] = (*described.get(name, ()), piece)
    return Report(file=FileRecord(bytes=size, sha256=sha256), pieces=described)


def describe_error(error: OSError) -> str:
    """What and where."""
    return f"{error.filename or 'disk'}: {error.strerror or error}"


def shard_name(process: int) -> str:
    """The file that a process writes."""
    return f"shard-{process:05}.safetensors"


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """Leaves with their paths, as params/layers/query."""

    def name(path: tuple[Any, ...]) -> str:
        return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)

    return [(name(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write and fsync manifest.json with the hash of its own content, and the directory's entries."""
    content = manifest.model_dump(mode="json")
    path = directory / "manifest.json"
    path.write_text(json.dumps({"sha256": content_hash(content), "manifest": content}, indent=1) + "\n")
    sync(path)
    sync(directory)


def content_hash(content: Any) -> str:
    """Hash of a JSON value, whatever its layout in the file."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# Loading


def read_manifest(directory: Path, is_hashed: bool = True) -> Manifest:
    """The manifest of a checkpoint whose files are all whole; `is_hashed` reads them through to be sure.

    Raises:
        UserError: which file of which step is missing or damaged, and how.
    """
    if directory.suffix in PICKLED:
        raise UserError(
            f"{directory}: pickled checkpoints are never read; load it where it was made and save its weights by "
            "safetensors.torch.save_file, or its model by save_pretrained, then train with --model-name on that"
        )
    path = directory / "manifest.json"
    try:
        found = json.loads(path.read_text())
        content, known_hash = found["manifest"], found["sha256"]
        newest = content["format"]
    except OSError as error:
        hint = "; a run: name one of its checkpoints/" if (directory / "checkpoints").is_dir() else ""
        raise UserError(f"{path}: no manifest, so no checkpoint ({error.strerror}){hint}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no manifest of ours, so damaged ({type(error).__name__}: {error})") from error
    if newest != MANIFEST_FORMAT:
        raise UserError(f"{path}: has format {newest!r}, this version of lacuna reads {MANIFEST_FORMAT}")
    if content_hash(content) != known_hash:
        raise UserError(f"{path}: its SHA-256 is not the one it states, so it is damaged")
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    for name, known in manifest.files.items():
        file = directory / name
        if file.parent != directory or not file.is_file():
            raise UserError(f"{file}: missing")
        if file.stat().st_size != known.bytes:
            raise UserError(f"{file}: {file.stat().st_size} bytes, the manifest says {known.bytes}")
        if is_hashed and file_hash(file) != known.sha256:
            raise UserError(f"{file}: its SHA-256 is not the manifest's, so it is damaged")
    for name, tensor in manifest.tensors.items():
        if not tiles(tensor) or not {piece.file for piece in tensor.pieces} <= manifest.files.keys():
            raise UserError(f"{path}: the pieces of {name} do not make up its shape {tensor.shape} exactly once")
    return manifest


def file_hash(path: Path) -> str:
    """Hash of a file's content."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def tiles(tensor: TensorRecord) -> bool:
    """Whether the pieces cover every index of the tensor exactly once."""
    boxes = [
        [(first, first + size) for first, size in zip(piece.begin, piece.shape, strict=False)]
        for piece in tensor.pieces
        if len(piece.begin) == len(piece.shape) == len(tensor.shape)
    ]
    cuts = [sorted({0, size, *(edge for box in boxes for edge in box[axis])}) for axis, size in enumerate(tensor.shape)]
    if len(boxes) < len(tensor.pieces) or any(
        cut[0] < 0 or cut[-1] > size for cut, size in zip(cuts, tensor.shape, strict=True)
    ):
        return False
    covered = np.zeros([len(cut) - 1 for cut in cuts], int)
    for box in boxes:
        edges = zip(cuts, box, strict=True)
        covered[tuple(slice(cut.index(lower), cut.index(upper)) for cut, (lower, upper) in edges)] += 1
    return bool(np.all(covered == 1))


@dataclass(frozen=True)
class SavedTensor:
    """A tensor of a checkpoint that is read when asked for, whole or layer by layer."""

    record: TensorRecord
    read_piece: Callable[[Piece, tuple[slice, ...]], np.ndarray]

    def within(self, bounds: Sequence[tuple[int, int]]) -> np.ndarray:
        """The values from the lower to the upper index on each axis, zeros beyond the tensor."""
        values = np.zeros([upper - lower for lower, upper in bounds], self.record.dtype)
        for piece in self.record.pieces:
            edges = [
                (max(lower, first), min(upper, first + size))
                for (lower, upper), first, size in zip(bounds, piece.begin, piece.shape, strict=True)
            ]
            if all(lower < upper for lower, upper in edges):
                here = tuple(slice(a - lower, b - lower) for (a, b), (lower, _) in zip(edges, bounds, strict=True))
                there = tuple(slice(a - first, b - first) for (a, b), first in zip(edges, piece.begin, strict=True))
                values[here] = self.read_piece(piece, there)
        return values

    def __getitem__(self, layer: int) -> np.ndarray:
        return self.within([(layer, layer + 1), *((0, size) for size in self.record.shape[1:])])[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.within([(0, size) for size in self.record.shape])


def open_checkpoint(directory: Path, manifest: Manifest, stack: ExitStack) -> dict[str, SavedTensor]:
    """Every tensor of a checkpoint by name, as long as `stack` is open."""
    try:
        files = {name: stack.enter_context(safe_open(directory / name, "numpy")) for name in manifest.files}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{directory}: {error}") from error

    def read(piece: Piece, part: tuple[slice, ...]) -> np.ndarray:
        return files[piece.file].get_slice(piece.key)[part] if part else files[piece.file].get_tensor(piece.key)

    return {name: SavedTensor(record, read) for name, record in manifest.tensors.items()}


def load_checkpoint(directory: Path, manifest: Manifest, abstract: PyTree, shapes: PyTree) -> PyTree[Array]:
    """The run state in the shapes and shardings of `abstract`, whatever devices it was saved from.

    `shapes` are those that were saved, without the rows that pad the vocabulary in memory.

    Raises:
        UserError: a tensor that is missing or of another shape.
    """
    with ExitStack() as stack:
        saved = open_checkpoint(directory, manifest, stack)

        def load(name: str, leaf: jax.ShapeDtypeStruct, shape: tuple[int, ...]) -> Array:
            tensor = saved.get(name)
            if tensor is None or tensor.record.shape != shape or tensor.record.dtype != leaf.dtype.name:
                found = "missing" if tensor is None else f"{tensor.record.dtype} of shape {tensor.record.shape}"
                raise UserError(
                    f"{directory}: {name} is {found}, this run wants {leaf.dtype.name} of shape {shape}; is it another "
                    "model's?"
                )
            assert leaf.sharding

            def shard(index: Any) -> np.ndarray:
                return tensor.within([part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True)])

            return jax.make_array_from_callback(leaf.shape, leaf.sharding, shard)

        leaves = [
            load(name, leaf, shape.shape)
            for (name, leaf), shape in zip(named_leaves(abstract), jax.tree.leaves(shapes), strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def saved_params(directory: Path, config: ModelConfig, stack: ExitStack) -> PyTree[SavedTensor]:
    """The parameters of a checkpoint that this process wrote or checked, each read when asked for."""
    table = parameter_table(config)
    saved = open_checkpoint(directory, read_manifest(directory, is_hashed=False), stack)
    return jax.tree.unflatten(jax.tree.structure(table), [saved[f"params/{name}"] for name, _ in named_leaves(table)])


# The checkpoints of a run


def checkpoint_directory(run_directory: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return run_directory / "checkpoints" / f"step_{step:08}"


def saved_steps(run_directory: Path) -> list[int]:
    """Steps of a run's checkpoints, oldest first."""
    names = (path.name for path in (run_directory / "checkpoints").glob("step_*"))
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"step_(\d{8,})", name)))


def newest_good(run_directory: Path, say: Callable[[str], None]) -> tuple[Path, Manifest] | None:
    """The newest whole checkpoint of a run and its manifest, none where none was saved; damaged ones are named.

    Raises:
        UserError: there are checkpoints, but none is whole.
    """
    damaged = []
    for step in reversed(saved_steps(run_directory)):
        directory = checkpoint_directory(run_directory, step)
        try:
            return directory, read_manifest(directory)
        except UserError as error:
            say(f"checkpoint passed over: {error}")
            damaged.append(str(error))
    if damaged:
        listed = "\n  ".join(damaged)
        raise UserError(
            f"{run_directory}: none of its {len(damaged)} checkpoints is whole; bring back files from a copy, or "
            f"start anew with --overwrite\n  {listed}"
        )
    return None


def remove_old(run_directory: Path, keep: int) -> None:
    """Remove what was left half-written, and all checkpoints but the newest `keep` and the best."""
    checkpoints = run_directory / "checkpoints"
    for leftover in (*checkpoints.glob("*.tmp"), *checkpoints.glob("*.old")):
        shutil.rmtree(leftover)
    best = (run_directory / "best").resolve()
    for step in saved_steps(run_directory)[:-keep]:
        if (directory := checkpoint_directory(run_directory, step)).resolve() != best:
            shutil.rmtree(directory.rename(directory.with_name(directory.name + ".old")))


def set_aside_later(run_directory: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step`, from which the run goes on another way, and return their new names."""
    moved = []
    for later in saved_steps(run_directory):
        if later > step:
            directory = checkpoint_directory(run_directory, later)
            aside = directory.with_name(f"{directory.name}.aside-{time.time_ns()}")
            moved.append(directory.rename(aside))
    if not (best := run_directory / "best").exists():
        best.unlink(missing_ok=True)
    return moved


def mark_best(run_directory: Path, directory: Path) -> None:
    """Let `best` point to a checkpoint of the run."""
    link = run_directory / "best.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(directory.relative_to(run_directory))
    os.replace(link, run_directory / "best")
