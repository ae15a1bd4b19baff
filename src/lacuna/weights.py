"""Models on disk in Hugging Face layout: found or fetched, read onto the devices, and written.

A directory is written beside its place, fsynced and renamed, so what has its final name is whole. Nothing is unpickled.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, PyTree
from safetensors import SafetensorError, safe_open

from lacuna.attention import choose_backend
from lacuna.config import ModelKeys, UserError
from lacuna.distributed import AXIS_RULES, check_divisible
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
    """A model's directory, its config with the vocabulary padded and attention chosen for the mesh, its tokenizer."""

    source: Path
    config: ModelConfig
    tokenizer: Tokenizer


def open_model(page: ModelKeys, mesh: Mesh, *template: str, with_weights: bool = True) -> OpenedModel:
    """All of a model but its weights, each part checked against the others; `template` is as for `load_tokenizer`.

    Raises:
        UserError: no such model, or one that is not supported, or does not fit the mesh or the page.
    """
    source = resolve_model(page.model_name, with_weights)
    config = config_on(source, page, mesh)
    tokenizer = load_tokenizer(source, *template)
    if tokenizer.vocabulary_size > config.vocabulary_size:
        raise UserError(
            f"{source}: the tokenizer has {tokenizer.vocabulary_size} tokens, config.json's vocab_size is "
            f"{config.vocabulary_size}; do they belong together?"
        )
    return OpenedModel(source, config, tokenizer)


def config_on(source: Path, page: ModelKeys, mesh: Mesh) -> ModelConfig:
    """The config in a model's directory, its vocabulary padded and its attention chosen for the mesh.

    Raises:
        UserError: the model is not supported, or does not fit the mesh or the page.
    """
    config = read_model_config(source)
    shards = mesh.shape[AXIS_RULES["vocab"]]
    backend, _ = choose_backend(page, mesh, config.head)
    config = replace(config, padded_vocabulary=-(-config.vocabulary_size // shards) * shards, attention=backend)
    check_divisible(mesh, config.sizes)
    return config


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


def load_params(directory: Path, config: ModelConfig, mesh: Mesh) -> PyTree[Array]:
    """Float32 weights from `directory`, each device reading only what it holds.

    Raises:
        UserError: no weights, or tensors that are missing, unknown or of another shape (the first ten of each).
    """
    table = parameter_table(config)
    with ExitStack() as stack:
        tensors = open_tensors(directory, stack)
        check_tensors(directory, config, tensors)
        return jax.tree.map(lambda row: load_parameter(row, tensors, config, mesh), table)


def check_tensors(directory: Path, config: ModelConfig, tensors: Mapping[str, FileTensor]) -> None:
    wanted = {
        name: file_shape(row, config)
        for row in jax.tree.leaves(parameter_table(config))
        for name in file_names(row, config)
    }
    # A tied model's file may repeat the embedding as its head; old files hold the rotary table.
    extra = [name for name in tensors if name not in wanted and not name.endswith("rotary_emb.inv_freq")]
    if config.is_tied:
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


def file_names(row: Parameter, config: ModelConfig) -> list[str]:
    """Names of a row's tensors in the file, one a layer where it has layers."""
    if not row.axes.startswith("layer "):
        return [row.file_name]
    return [row.file_name.format(layer=layer) for layer in range(config.layers)]


def file_shape(row: Parameter, config: ModelConfig) -> tuple[int, ...]:
    """Shape of one of a row's tensors in the file, where the vocabulary is not padded."""
    sizes = config.sizes | {"vocab": config.vocabulary_size}
    return tuple(math.prod(sizes[axis] for axis in merged.split("*")) for merged in row.file_axes.split())


def load_parameter(row: Parameter, tensors: Mapping[str, FileTensor], config: ModelConfig, mesh: Mesh) -> Array:
    """One weight over the mesh; each shard's part of each file tensor is read, split into axes and transposed."""
    axes = row.axes.split()
    has_layers = axes[0] == "layer"
    memory_axes = axes[1:] if has_layers else axes
    file_order = [axis for merged in row.file_axes.split() for axis in merged.split("*")]
    names = file_names(row, config)

    def shard(index: Any) -> np.ndarray:
        bounds = {axis: part.indices(config.sizes[axis])[:2] for axis, part in zip(axes, index, strict=True)}
        layers = names[slice(*bounds["layer"])] if has_layers else names
        parts = [
            read_part(tensors[name], row, config, bounds, file_order).transpose(
                [file_order.index(axis) for axis in memory_axes]
            )
            for name in layers
        ]
        return np.stack(parts) if has_layers else np.ascontiguousarray(parts[0])

    sharding = NamedSharding(mesh, partition_spec(row))
    return jax.make_array_from_callback(shape_of(row, config.sizes), sharding, shard)


def read_part(
    tensor: FileTensor,
    row: Parameter,
    config: ModelConfig,
    bounds: Mapping[str, tuple[int, int]],
    file_order: list[str],
) -> np.ndarray:
    """The float32 part of a file tensor within `bounds`, its merged axes apart, zeros where the vocabulary is padded.

    Of merged axes only the first may be cut, which keeps what is read in one piece.
    """
    slices, padding = [], [(0, 0)] * len(file_order)
    for merged in row.file_axes.split():
        first, *inner = merged.split("*")
        size = math.prod(config.sizes[axis] for axis in inner)
        begin, end = bounds[first]
        if first == "vocab":
            known = max(begin, min(end, config.vocabulary_size))
            padding[file_order.index("vocab")] = (0, end - known)
            end = known
        slices.append(slice(begin * size, end * size))
    part = np.asarray(tensor.read(tuple(slices))).astype(np.float32)
    lengths = [bounds[axis][1] - bounds[axis][0] - padding[number][1] for number, axis in enumerate(file_order)]
    return np.pad(part.reshape(lengths), padding)


def save_model(directory: Path, params: PyTree, config: ModelConfig, source: Path, chat_template: str = "") -> None:
    """Write a model in Hugging Face layout, with the config and tokenizer files of `source`, in the config's dtype.

    A `chat_template` file given in place of the source's own goes along. Safetensors of at most 5 GB each, with an
    index where there are several; `params`, arrays or tensors of a checkpoint, are read layer by layer.
    """
    scratch = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        write_model(scratch, params, config)
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


def write_model(scratch: Path, params: PyTree, config: ModelConfig) -> None:
    """The weights alone, in as many files as their size asks for."""
    dtype = np.dtype(FILE_DTYPES[config.file_dtype])
    leaf_of = dict(zip(jax.tree.leaves(parameter_table(config)), jax.tree.leaves(params), strict=True))
    shards: list[dict[str, tuple[Parameter, int]]] = [{}]
    room = SHARD_BYTES
    for row in leaf_of:
        size = math.prod(file_shape(row, config)) * dtype.itemsize
        for layer, name in enumerate(file_names(row, config)):
            if size > room and shards[-1]:
                shards.append({})
                room = SHARD_BYTES
            shards[-1][name] = row, layer
            room -= size
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        shapes = {name: (dtype, file_shape(row, config)) for name, (row, _) in shard.items()}
        parts = (file_tensor(leaf_of[row], row, layer, config, dtype) for row, layer in shard.values())
        write_safetensors(scratch / file, shapes, parts, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = (
            sum(math.prod(file_shape(row, config)) for shard in shards for row, _ in shard.values()) * dtype.itemsize
        )
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (scratch / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def file_tensor(leaf: Any, row: Parameter, layer: int, config: ModelConfig, dtype: Any) -> np.ndarray:
    """One tensor of the file from a weight in memory: its layer, transposed and merged back, the padding off."""
    axes = row.axes.split()
    if axes[0] == "layer":
        leaf, axes = leaf[layer], axes[1:]
    file_order = [axis for merged in row.file_axes.split() for axis in merged.split("*")]
    whole = np.asarray(leaf).transpose([axes.index(axis) for axis in file_order])
    if axes[0] == "vocab":
        whole = whole[: config.vocabulary_size]
    return np.ascontiguousarray(whole.reshape(file_shape(row, config)).astype(dtype))


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
