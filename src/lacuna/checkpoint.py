"""Files of models and runs: Hugging Face layout in and out, and run states saved beside training and loaded anywhere.

A checkpoint is a directory of safetensors files, one for each process, which hold the pieces of all tensors, and a
manifest that hashes every file, itself included. Directories are written under another name, synced and renamed, so
one with its final name is complete. Nothing is unpickled.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import threading
import time
import tomllib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, combinations
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.tree_util import keystr
from jaxtyping import Array, PyTree
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open

from lacuna.attention import choose_backend
from lacuna.config import DataKeys, ModelKeys, TemplateKeys, TrainingConfig, UserError
from lacuna.distributed import AXIS_RULES, check_divisible, describe_error, fast_dtype, from_first, is_first, to_first
from lacuna.metrics import byte_size, duration
from lacuna.model import ModelConfig, Parameter, parameter_table, partition_spec, read_model_config, shape_of
from lacuna.tokenizer import Tokenizer, load_tokenizer

DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int32": "I32"}  # ours, in a file's header
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
SHARD_BYTES = 5 * 10**9
LISTED = 10
MANIFEST_FORMAT = 3
FAILURES_IN_A_ROW = 3
NO_SUCH_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
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

Config = TypeVar("Config", bound=ModelKeys)

# Models


def resolve_model(model_name: str, with_weights: bool = True) -> Path:
    """The directory of a model: a local one, the model of one of our runs, or a hub id's, fetched into its cache.

    Raises:
        UserError: no such directory, and no such model on the hub, or the hub can't be reached.
    """
    path = Path(model_name)
    if (path / "model" / "config.json").is_file():
        return path / "model"
    if (path / "manifest.json").is_file():
        raise UserError(f"{path}: a checkpoint to resume from, not a model; a run exports its model when it ends")
    if (path / "config.toml").is_file():
        raise UserError(f"{path}: a run that has not ended, so it has no model yet; continue it with --resume")
    if path.is_dir():
        return path
    import huggingface_hub
    from huggingface_hub import errors

    wanted = ["config.json", *TOKENIZER_FILES]
    if with_weights:
        wanted += ["model*.safetensors", "model.safetensors.index.json"]
    name, _, revision = model_name.partition("@")
    try:
        fetched = huggingface_hub.snapshot_download(
            name, revision=revision or None, allow_patterns=wanted, ignore_patterns="*/*"
        )
        return Path(fetched)
    except Exception as error:  # its HTTP and storage clients raise their own kinds
        if isinstance(error, errors.GatedRepoError):
            reason = "access is restricted; accept its terms on its page on the hub, then log in with `hf auth login`"
        elif isinstance(error, errors.HFValidationError | errors.RepositoryNotFoundError):
            reason = (
                "no such directory, and no such model on the hub, whose ids are like Qwen/Qwen2.5-0.5B "
                "(a private one needs `hf auth login`)"
            )
        else:
            reason = (
                "no such directory, not complete in the hub's cache, and the download failed "
                f"({error.__cause__ or error}); once that is fixed, the same command fetches the rest"
            )
        raise UserError(f"model_name {model_name!r}: {' '.join(reason.split())}") from error


def settled(config: Config, platform: str = "") -> Config:
    """The config with what it leaves open decided for good, or as the run that it resumes decided it: the commit of a
    hub id, the type of compute on this platform (this machine's, if it is empty), and the length of rows.

    Raises:
        UserError: no such model.
    """
    before, changes = dict[str, Any](), dict[str, Any]()
    if isinstance(config, TrainingConfig) and config.resume_from:
        before = read_manifest(Path(config.resume_from)).run.config
    elif isinstance(config, TrainingConfig) and config.resume and (config.run_directory / "config.toml").is_file():
        before = tomllib.loads((config.run_directory / "config.toml").read_text())
    name, known = config.model_name, str(before.get("model_name", ""))
    if not Path(name).exists():
        name = known if known.startswith(f"{name}@") else name
    source = resolve_model(name, with_weights=False)
    if not Path(name).exists() and name != known:
        name = f"{name.partition('@')[0]}@{source.name}"
    changes["model_name"] = name
    if config.compute_dtype == "auto":
        changes["compute_dtype"] = before.get("compute_dtype", fast_dtype(config, platform or jax.default_backend()))
    if isinstance(config, DataKeys) and "sequence_length" not in config.model_fields_set:
        allowed = read_model_config(source).capacity(config.sequence_length)
        changes["sequence_length"] = before.get("sequence_length", allowed)
    return config.model_copy(update=changes)


def newest_run(output_dir: str) -> Path:
    """The run in this folder whose model was written last; UserError if there is none."""
    exported = sorted(Path(output_dir).glob("*/model/config.json"), key=lambda path: path.stat().st_mtime)
    if not exported:
        raise UserError(f"{output_dir}: no run with a model in it; give --model-name, or train one first")
    return exported[-1].parents[1]


class OpenedModel(NamedTuple):
    """A model without its weights: its directory, what config.json says (the vocabulary padded and attention chosen for
    the mesh), its tokenizer, the devices, and the start-up line about attention."""

    source: Path
    model: ModelConfig
    tokenizer: Tokenizer
    mesh: Mesh
    attention_line: str


def open_model(config: ModelKeys, mesh: Mesh, with_weights: bool = True) -> OpenedModel:
    """The model of a config on a mesh, its parts checked against each other.

    Raises:
        UserError: no such model, or one that is not supported or does not fit the mesh or the config.
    """
    source = resolve_model(config.model_name, with_weights)
    model, attention_line = model_on(source, config, mesh)
    tokenizer = load_tokenizer(source, *(config.template if isinstance(config, TemplateKeys) else ()))
    if tokenizer.vocabulary_size > model.vocabulary_size:
        raise UserError(
            f"{source}: the tokenizer has {tokenizer.vocabulary_size} tokens, config.json's vocab_size is "
            f"{model.vocabulary_size}; do they belong together?"
        )
    return OpenedModel(source, model, tokenizer, mesh, attention_line)


def model_on(source: Path, config: ModelKeys, mesh: Mesh) -> tuple[ModelConfig, str]:
    """A directory's model, its vocabulary padded and its attention chosen for the mesh, and a line about the latter.

    Raises:
        UserError: the model is not supported, or does not fit the mesh or the config.
    """
    model = read_model_config(source)
    shards = mesh.shape[AXIS_RULES["vocab"]]
    backend, line = choose_backend(config, mesh, model.head)
    model = replace(model, padded_vocabulary=math.ceil(model.vocabulary_size / shards) * shards, attention=backend)
    check_divisible(mesh, model.sizes)
    return model, line


# Tensors in files, whole or in pieces

Box = tuple[tuple[int, int], ...]  # of each axis the first index and the one after the last


def whole(shape: Sequence[int]) -> Box:
    """The box of a whole tensor."""
    return tuple((0, size) for size in shape)


def shard_box(index: Any, shape: Sequence[int]) -> Box:
    """The box of a shard, from JAX's slices."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def overlap(one: Box, other: Box) -> Box | None:
    """What two boxes share, if anything."""
    shared = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return shared if all(begin < end for begin, end in shared) else None


def within(box: Box, outer: Box) -> tuple[slice, ...]:
    """Slices that take a box out of an array that holds the box `outer`."""
    return tuple(slice(begin - first, end - first) for (begin, end), (first, _) in zip(box, outer, strict=True))


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in files in one or more pieces, read box by box when needed."""

    dtype: np.dtype
    pieces: list[tuple[Box, Any]]

    @property
    def shape(self) -> tuple[int, ...]:
        """Where the last of the pieces end."""
        return tuple(max(end for _, end in spans) for spans in zip(*(box for box, _ in self.pieces), strict=True))

    @property
    def is_whole(self) -> bool:
        """Whether the pieces cover every index exactly once."""
        boxes = [box for box, _ in self.pieces]
        is_apart = not any(overlap(*pair) is not None for pair in combinations(boxes, 2))
        return is_apart and sum(math.prod(end - begin for begin, end in box) for box in boxes) == math.prod(self.shape)

    def read(self, box: Box) -> np.ndarray:
        """The values within a box, zeros beyond the tensor."""
        values = np.zeros([end - begin for begin, end in box], self.dtype)
        for held, piece in self.pieces:
            if (shared := overlap(box, held)) is not None:
                values[within(shared, box)] = piece[within(shared, held)]
        return values

    def __getitem__(self, layer: int) -> np.ndarray:
        return self.read(((layer, layer + 1), *whole(self.shape[1:])))[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.read(whole(self.shape))


def open_tensors(paths: Iterable[Path]) -> dict[str, StoredTensor]:
    """Every tensor of safetensors files by name; a key such as `name@64,0` is of a piece that begins at that index.

    Floats are read as float32.

    Raises:
        UserError: a file is missing or damaged, or the pieces of a tensor do not make it up.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        try:
            file = safe_open(path, "numpy")
            for key in file.keys():
                name, _, begin = key.partition("@")
                piece = file.get_slice(key)
                shape = piece.get_shape()
                first = map(int, begin.split(",")) if begin else [0] * len(shape)
                box = tuple((start, start + size) for start, size in zip(first, shape, strict=True))
                dtype = np.dtype(np.int32 if piece.get_dtype() == "I32" else np.float32)
                tensors.setdefault(name, StoredTensor(dtype, [])).pieces.append((box, piece))
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(f"{path}: damaged or not safetensors ({error}); copy or fetch the file again") from error
    for name, tensor in tensors.items():
        if not tensor.is_whole:
            where = sorted(box for box, _ in tensor.pieces)
            raise UserError(f"{path.parent}: the pieces of {name}, at {where}, do not make it up exactly once")
    return tensors


# Weights in Hugging Face layout


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model, single or with an index.

    Raises:
        UserError: there are none, or the index is damaged.
    """
    index, names = directory / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{index}: no index of safetensors files ({error!r}); fetch the file again") from error
        if outside := [name for name in names if Path(name).name != name]:
            raise UserError(f"{index}: names the file {outside[0]!r}, which is not in the same directory")
    paths = [directory / name for name in names]
    if missing := [path for path in paths if not path.is_file()]:
        what_to_do = "to train from random weights, add --from-scratch"
        if any(path.suffix in PICKLED for path in directory.iterdir()):
            loader = f"transformers' AutoModelForCausalLM.from_pretrained({str(directory)!r}).save_pretrained(…)"
            what_to_do = f"pickled weights are never read; convert them with {loader}"
        raise UserError(f"{missing[0]}: no such file; {what_to_do}")
    return paths


def load_params(directory: Path, model: ModelConfig, mesh: Mesh) -> PyTree[Array]:
    """Float32 weights from `directory`, each device reading only its part.

    Raises:
        UserError: no weights, or tensors that are missing, unknown or of another shape (the first ten are listed).
    """
    tensors = open_tensors(weight_files(directory))
    check_tensors(directory, model, tensors)
    return jax.tree.map(lambda row: load_parameter(row, tensors, model, mesh), parameter_table(model))


def check_tensors(directory: Path, model: ModelConfig, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse a model whose files do not hold exactly the tensors that its config asks for."""
    found = {name: tensor.shape for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if model.is_tied:  # some files repeat the embedding as the head; old ones also hold the rotary table
        found.pop("lm_head.weight", None)
    wanted = {
        name: file_shape(row, model)
        for row in jax.tree.leaves(parameter_table(model))
        for name in file_names(row, model)
    }
    wrong = [
        f"{name}: {found.get(name, 'missing')} in the files, {wanted.get(name, 'unknown')} by config.json"
        for name in wanted | found
        if found.get(name) != wanted.get(name)
    ]
    if wrong:
        listed = "\n  ".join(wrong[:LISTED] + ([f"… and {len(wrong) - LISTED} more"] if len(wrong) > LISTED else []))
        raise UserError(f"{directory}: the weights do not fit config.json; do they belong together?\n  {listed}")


def has_layers(row: Parameter) -> bool:
    """Whether the file has a tensor of this row for each layer."""
    return row.axes.startswith("layer ")


def file_names(row: Parameter, model: ModelConfig) -> list[str]:
    """Names of a row's tensors in the file."""
    return [row.file_name.format(layer=layer) for layer in range(model.layers if has_layers(row) else 1)]


def file_shape(row: Parameter, model: ModelConfig) -> tuple[int, ...]:
    """Shape of each of a row's tensors in the file, where the vocabulary is not padded."""
    sizes = model.sizes | {"vocab": model.vocabulary_size}
    return tuple(math.prod(sizes[axis] for axis in merged.split("*")) for merged in row.file_axes.split())


def file_order(row: Parameter) -> list[str]:
    """Axes of a row's tensors in the file, merged ones apart."""
    return row.file_axes.replace("*", " ").split()


def load_parameter(row: Parameter, tensors: Mapping[str, StoredTensor], model: ModelConfig, mesh: Mesh) -> Array:
    """One weight over the mesh; each shard reads its part of each layer's tensor."""
    shape, names = shape_of(row, model.sizes), file_names(row, model)

    def shard(index: Any) -> np.ndarray:
        spans = dict(zip(row.axes.split(), shard_box(index, shape), strict=True))
        layers = slice(*spans.pop("layer", (0, 1)))
        parts = [from_file(tensors[name], row, spans) for name in names[layers]]
        return np.stack(parts) if has_layers(row) else parts[0]

    return jax.make_array_from_callback(shape, NamedSharding(mesh, partition_spec(row)), shard)


def from_file(tensor: StoredTensor, row: Parameter, spans: Mapping[str, tuple[int, int]]) -> np.ndarray:
    """The part of a file's tensor within the spans of its axes, split into those axes and transposed to their order.

    Of merged axes only the first may be cut, so what is read is in one piece.
    """
    sizes = {axis: end - begin for axis, (begin, end) in spans.items()}
    box = []
    for first, *inner in (merged.split("*") for merged in row.file_axes.split()):
        stride = math.prod(sizes[axis] for axis in inner)
        box.append((spans[first][0] * stride, spans[first][1] * stride))
    axes = file_order(row)
    values = tensor.read(tuple(box)).reshape([sizes[axis] for axis in axes])
    return values.transpose([axes.index(axis) for axis in spans])


def file_tensor(leaf: Any, row: Parameter, layer: int, model: ModelConfig, dtype: Any) -> np.ndarray:
    """A file's tensor from a weight in memory: its layer without padding, transposed, merged and cast."""
    axes = row.axes.split()
    if has_layers(row):
        leaf, axes = leaf[layer], axes[1:]
    values = np.asarray(leaf).transpose([axes.index(axis) for axis in file_order(row)])
    if "vocab" in axes:
        values = values[: model.vocabulary_size]
    return values.reshape(file_shape(row, model)).astype(dtype)


def save_model(directory: Path, params: PyTree, model: ModelConfig, source: Path) -> list[str]:
    """Write a model in Hugging Face layout and the config's dtype, with the config and tokenizer files of `source`.

    Safetensors files hold at most 5 GB each, with an index if there are several; `params`, arrays or stored tensors,
    are read layer by layer. Returns what went wrong once the model was complete.
    """
    scratch = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        copy_description(source, scratch)
        write_weights(scratch, params, model)
        return replace_directory(scratch, directory)
    except OSError:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def copy_description(source: Path, directory: Path, changed: Mapping[str, str] | None = None) -> None:
    """Copy what a model has besides weights; files in `changed`, by name, have that text instead."""
    directory.mkdir(parents=True)
    for name in ("config.json", *TOKENIZER_FILES):
        if name == "config.json" or (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
    for name, text in (changed or {}).items():
        (directory / name).write_text(text, "utf-8")


def write_weights(scratch: Path, params: PyTree, model: ModelConfig) -> None:
    """Write the safetensors files of a model."""
    dtype, table = jnp.dtype(model.file_dtype), parameter_table(model)
    tensors = {
        name: (leaf, row, layer)
        for row, leaf in zip(jax.tree.leaves(table), jax.tree.leaves(params), strict=True)
        for layer, name in enumerate(file_names(row, model))
    }
    shapes = {name: (dtype, file_shape(row, model)) for name, (_, row, _) in tensors.items()}
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (_, shape) in shapes.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    files = {"model.safetensors": shards[0]}
    if len(shards) > 1:
        files = {f"model-{number:05}-of-{len(shards):05}.safetensors": names for number, names in enumerate(shards, 1)}
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (scratch / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    for file, names in files.items():
        values = (file_tensor(*tensors[name], model, dtype) for name in names)
        write_safetensors(scratch / file, {name: shapes[name] for name in names}, values)


# Writing


def write_safetensors(
    path: Path, shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]], tensors: Iterable[np.ndarray]
) -> str:
    """Write and sync tensors one by one in the order of `shapes`; the file's SHA-256, computed on the way.

    The library's own writer wants a second copy of all tensors in memory and blocks every other thread meanwhile.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype.name], "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    contents = (np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data for tensor in tensors)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in chain((len(text).to_bytes(8, "little"), text), contents):
            file.write(part)
            digest.update(part)
        assert file.tell() == 8 + len(text) + end
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def replace_directory(scratch: Path, directory: Path) -> list[str]:
    """Give a complete directory its final name, in place of what was there, once all of it is on the disk.

    Returns what went wrong after it had its name.
    """
    for path in (*scratch.iterdir(), scratch):
        sync(path)
    if directory.exists():
        os.rename(directory, directory.with_name(f"{directory.name}.{time.time_ns()}.old"))
    os.rename(scratch, directory)
    problems = failures_of(partial(sync, directory.parent))
    for old in directory.parent.glob(f"{directory.name}.*old"):
        problems += failures_of(partial(shutil.rmtree, old))
    return problems


def sync(path: Path) -> None:
    """Wait until a file or directory is on the disk; some file systems (CIFS, 9p) can't tell of directories."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in NO_SUCH_SYNC):
            raise
    finally:
        os.close(handle)


def failures_of(work: Callable[[], Any]) -> list[str]:
    """Do what a save does not depend on; returns why it could not be done, if so."""
    try:
        work()
    except OSError as error:
        return [describe_error(error)]
    return []


# The manifest of a checkpoint


class RunFacts(BaseModel, extra="forbid", frozen=True):
    """What a run needs besides its state to resume, and what must not have changed by then.

    `best` is the best held-out loss of pretrain and sft so far, or grpo's best held-out reward.
    """

    step: int
    best: float | None
    wall_seconds: float
    config: dict[str, Any]
    model: dict[str, Any]
    data: tuple[str, ...]
    inputs: dict[str, str] = {}  # of older runs not known
    versions: dict[str, str]


class Manifest(BaseModel, extra="forbid", frozen=True):
    """What a checkpoint is of, and the SHA-256 of each process's file."""

    format: int
    run: RunFacts
    shards: tuple[str, ...]


def shard_path(directory: Path, process: int) -> Path:
    """The file that a process writes."""
    return directory / f"shard-{process:05}.safetensors"


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json with the hash of its own content."""
    content = manifest.model_dump(mode="json")
    text = json.dumps({"sha256": content_hash(content), "manifest": content}, indent=1)
    (directory / "manifest.json").write_text(text + "\n")


def content_hash(content: Any) -> str:
    """Hash of a JSON value, whatever its layout in the file."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def files_digest(paths: Iterable[Path]) -> str:
    """A hash of the content of files."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint, itself intact.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if directory.suffix in PICKLED:
        raise UserError(
            f"{directory}: pickled checkpoints are never read; load it where it was made and save its weights with "
            "safetensors.torch.save_file, or its model with save_pretrained, then train with --model-name on that"
        )
    path = directory / "manifest.json"
    try:
        found = json.loads(path.read_text())
        content = found["manifest"]
        if content["format"] != MANIFEST_FORMAT:
            raise ValueError(f"it has format {content['format']!r}, this version of lacuna reads {MANIFEST_FORMAT}")
        if content_hash(content) != found["sha256"]:
            raise ValueError("its SHA-256 is not the one it states")
        return Manifest.model_validate(content)
    except OSError as error:
        hint = "; a run: name one of its checkpoints/" if (directory / "checkpoints").is_dir() else ""
        raise UserError(f"{path}: no manifest, so no checkpoint ({error.strerror}){hint}") from error
    except (ValueError, KeyError, TypeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path}: no manifest of ours, so damaged ({reason})") from error


def checked_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint whose files were all read and found intact.

    Raises:
        UserError: which file of which step is missing or damaged, and how.
    """
    manifest = read_manifest(directory)
    for process, sha256 in enumerate(manifest.shards):
        path = shard_path(directory, process)
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from error
        if found != sha256:
            raise UserError(f"{path}: its SHA-256 is not the manifest's, so it is damaged")
    open_checkpoint(directory, manifest)
    return manifest


# Run states

leaf_name = partial(keystr, simple=True, separator="/")


def open_checkpoint(directory: Path, manifest: Manifest) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by its path in the state, as params/layers/query."""
    return open_tensors(shard_path(directory, process) for process in range(len(manifest.shards)))


def load_checkpoint(directory: Path, manifest: Manifest, abstract: PyTree, shapes: PyTree) -> PyTree[Array]:
    """The run state in the shapes and shardings of `abstract`, whatever devices it was saved from.

    `shapes` are those that were saved, without the rows that pad the vocabulary in memory.

    Raises:
        UserError: a tensor is missing or of another shape.
    """
    saved = open_checkpoint(directory, manifest)

    def load(path: Any, leaf: jax.ShapeDtypeStruct, wanted: jax.ShapeDtypeStruct) -> Array:
        name = leaf_name(path)
        tensor = saved.get(name)
        if tensor is None or (tensor.shape, tensor.dtype) != (wanted.shape, wanted.dtype):
            found = "missing" if tensor is None else f"{tensor.dtype} of shape {tensor.shape}"
            raise UserError(
                f"{directory}: {name} is {found}, this run wants {wanted.dtype} of shape {wanted.shape}; is it another "
                "model's?"
            )
        assert leaf.sharding
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: tensor.read(shard_box(index, leaf.shape))
        )

    return jax.tree.map_with_path(load, abstract, shapes)


def saved_params(directory: Path, model: ModelConfig) -> PyTree[StoredTensor]:
    """The parameters of a checkpoint that this process wrote or checked, each read when needed."""
    saved = open_checkpoint(directory, read_manifest(directory))
    return jax.tree.map_with_path(lambda path, _: saved[f"params/{leaf_name(path)}"], parameter_table(model))


def copied_pieces(state: PyTree[Array], shapes: PyTree) -> dict[str, np.ndarray]:
    """Copies of those pieces of the state that this process writes, by the tensor's path and the piece's first index.

    Every element is in one piece, written by one process; rows that pad the vocabulary are in none.
    """
    for leaf in jax.tree.leaves(state):
        leaf.copy_to_host_async()
    copies = {}
    for (path, leaf), wanted in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(shapes), strict=True):
        for shard in leaf.addressable_shards:
            held = shard_box(shard.index, leaf.shape)
            if shard.replica_id == 0 and (box := overlap(held, whole(wanted.shape))) is not None:
                key = f"{leaf_name(path)}@{','.join(str(begin) for begin, _ in box)}"
                copies[key] = np.array(np.asarray(shard.data)[within(box, held)])
    return copies


def write_pieces(scratch: Path, copies: Mapping[str, np.ndarray], needed: int) -> str:
    """Write this process's file in `scratch`, if there is room for the `needed` bytes of all processes; its SHA-256."""
    path = shard_path(scratch, jax.process_index())
    scratch.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(scratch).free) < needed:
        raise OSError(errno.ENOSPC, f"{byte_size(needed)} are needed, {byte_size(free)} are free", str(path))
    shapes = {key: (values.dtype, values.shape) for key, values in copies.items()}
    return write_safetensors(path, shapes, copies.values())


# Saving


class Saver:
    """Saves a run's state: training waits only for the copy off the devices, a thread writes and commits.

    `session` tells apart what different starts of a run leave unfinished; `newest` and `best` are of the run resumed.
    """

    def __init__(
        self, run_directory: Path, keep: int, session: str, newest: Path | None = None, best: float | None = None
    ) -> None:
        self.run_directory, self.keep, self.session = run_directory, keep, session
        self.newest, self.best = newest, best  # of what is saved
        self.failures = 0
        self.saves: deque[futures.Future[str]] = deque()  # begun and not yet reported

    def save(self, state: PyTree[Array], shapes: PyTree, facts: RunFacts, is_best: bool) -> float:
        """Start to save, once the previous save has ended; returns for how many seconds this held up the caller.

        `shapes` are those to be saved, without the rows that pad the vocabulary in memory. Unless this is the best, the
        best of `facts` becomes that of what is saved by then.
        """
        began = time.perf_counter()
        self.wait()
        facts = facts if is_best else facts.model_copy(update={"best": self.best})
        copies, outcome = copied_pieces(state, shapes), futures.Future[str]()
        needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))

        def complete() -> None:
            try:
                outcome.set_result(self.write(copies, needed, facts, is_best, began))
            except BaseException as error:
                outcome.set_exception(error)

        self.saves.append(outcome)
        threading.Thread(target=complete, daemon=True).start()
        return time.perf_counter() - began

    def write(self, copies: Mapping[str, np.ndarray], needed: int, facts: RunFacts, is_best: bool, began: float) -> str:
        """Write this process's file and, once all have theirs, let the first commit; returns a line for the log.

        Raises:
            UserError: this is the third save in a row to fail.
        """
        directory = checkpoint_directory(self.run_directory, facts.step)
        scratch = directory.with_name(f"{directory.name}.{self.session}.tmp")
        sha256 = problem = warning = ""
        try:
            sha256 = write_pieces(scratch, copies, needed)
        except OSError as error:
            problem = describe_error(error)
        reports = [json.loads(text) for text in to_first(f"save {facts.step}", json.dumps([sha256, problem]))]
        if is_first():
            problem = next((problem for _, problem in reports if problem), "")
            if not problem:
                manifest = Manifest(format=MANIFEST_FORMAT, run=facts, shards=tuple(sha256 for sha256, _ in reports))
                problem, warning = self.commit(scratch, directory, manifest, is_best)
        problem = from_first(f"commit {facts.step}", problem)
        if not problem:
            self.failures, self.newest, self.best = 0, directory, facts.best
            best = ", the best so far" if is_best else ""
            seconds = duration(time.perf_counter() - began)
            return f"saved {directory}{best} ({byte_size(needed)} in {seconds}){warning}"
        shutil.rmtree(scratch, ignore_errors=True)
        self.failures += 1
        outcome = f"step {facts.step} could not be saved: {problem}"
        if self.failures >= FAILURES_IN_A_ROW:
            raise UserError(f"{outcome}; {self.failures} saves in a row failed: make room and add --resume")
        return f"WARNING: {outcome}; training continues and the next save tries again ({self.failures} in a row)"

    def commit(self, scratch: Path, directory: Path, manifest: Manifest, is_best: bool) -> tuple[str, str]:
        """Write the manifest, give the checkpoint its name, remove what is no longer kept.

        Returns why it is not saved, if so, and a warning of what went wrong after it was.
        """
        try:
            write_manifest(scratch, manifest)
            problems = replace_directory(scratch, directory)
        except OSError as error:
            return describe_error(error), ""
        if is_best:
            problems += failures_of(partial(mark_best, self.run_directory, directory))
        problems += remove_old(self.run_directory, self.keep)
        return "", f"; WARNING: {'; '.join(problems)}" if problems else ""

    def news(self) -> Iterator[str]:
        """Lines about the saves that have ended since the last call.

        Raises:
            UserError: the third save in a row has failed.
        """
        while self.saves and self.saves[0].done():
            yield self.saves.popleft().result()

    def wait(self) -> None:
        """Wait until the last save has ended, whatever its outcome."""
        futures.wait(self.saves)

    @contextmanager
    def finishing(self) -> Generator[None]:
        """When an error ends the run, let the save under way end first, but not when a user leaves at once."""
        try:
            yield
        except Exception:
            self.wait()
            raise


# The checkpoints of a run


def checkpoint_directory(run_directory: Path, step: int) -> Path:
    """The directory of a step's checkpoint."""
    return run_directory / "checkpoints" / f"step_{step:08}"


def saved_steps(run_directory: Path) -> list[int]:
    """Steps of a run's checkpoints, oldest first."""
    names = (path.name for path in (run_directory / "checkpoints").glob("step_*"))
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"step_(\d{8,})", name)))


def newest_good(run_directory: Path, say: Callable[[str], None]) -> tuple[Path, Manifest] | None:
    """The newest intact checkpoint of a run and its manifest, None if none was saved; damaged ones are named.

    Raises:
        UserError: there are checkpoints, but none is intact.
    """
    damaged = []
    for step in reversed(saved_steps(run_directory)):
        directory = checkpoint_directory(run_directory, step)
        try:
            return directory, checked_manifest(directory)
        except UserError as error:
            say(f"checkpoint passed over: {error}")
            damaged.append(str(error))
    if damaged:
        listed = "\n  ".join(damaged)
        raise UserError(
            f"{run_directory}: none of its {len(damaged)} checkpoints is intact; restore files from a copy, or start "
            f"from scratch with --overwrite\n  {listed}"
        )
    return None


def remove_old(run_directory: Path, keep: int) -> list[str]:
    """Remove what was left half-written, and all checkpoints except the newest `keep` and the best.

    Returns what could not be removed.
    """
    checkpoints, best = run_directory / "checkpoints", best_checkpoint(run_directory)
    old = [checkpoint_directory(run_directory, step) for step in saved_steps(run_directory)[:-keep]]
    problems = []
    for directory in (*checkpoints.glob("*.tmp"), *checkpoints.glob("*.old"), *old):
        if directory.resolve() != best:
            problems += failures_of(partial(remove, directory))
    return problems


def remove(directory: Path) -> None:
    """Remove a directory which no one takes for a whole one on the way."""
    if directory.suffix not in (".tmp", ".old"):
        directory = directory.rename(directory.with_name(directory.name + ".old"))
    shutil.rmtree(directory)


def set_aside_later(run_directory: Path, step: int) -> list[Path]:
    """Rename checkpoints newer than `step`, because the resumed run will diverge from them; returns their new names."""
    moved = []
    if (best := run_directory / "best").is_dir() and not best.is_symlink():  # a copy that followed the link
        original = checkpoint_directory(run_directory, read_manifest(best).run.step)
        if original.exists():
            best.rename(original.with_name(f"best.{time.time_ns()}.old"))
        else:
            best.rename(original)
        mark_best(run_directory, original)
    for later in saved_steps(run_directory):
        if later > step:
            directory = checkpoint_directory(run_directory, later)
            aside = directory.with_name(f"{directory.name}.aside-{time.time_ns()}")
            moved.append(directory.rename(aside))
    if not best_checkpoint(run_directory).is_dir():
        best.unlink(missing_ok=True)
    return moved


def mark_best(run_directory: Path, directory: Path) -> None:
    """Make `best` point to a checkpoint of the run, by a file with its path where there are no symbolic links."""
    link, target = run_directory / "best.tmp", directory.relative_to(run_directory)
    link.unlink(missing_ok=True)
    try:
        link.symlink_to(target)
    except OSError:
        link.write_text(f"{target}\n")
    os.replace(link, run_directory / "best")


def best_checkpoint(run_directory: Path) -> Path:
    """Where `best` points, if to anything."""
    best = run_directory / "best"
    return (run_directory / best.read_text().strip() if best.is_file() else best).resolve()
