"""Weights and run state on disk: Hugging Face safetensors in and out, and checkpoints that a run resumes from.

Both are written beside their place, fsynced and renamed, so what has its final name is whole. Nothing is unpickled.
"""

import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, PyTree
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lacuna.config import UserError
from lacuna.metrics import versions
from lacuna.model import ModelConfig, Parameter, parameter_table, partition_spec, shape_of

FILE_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
SHARD_BYTES = 5 * 10**9
LISTED = 10
MANIFEST_FORMAT = 1
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

# Models in Hugging Face layout


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


def save_model(
    directory: Path, params: PyTree[Array], config: ModelConfig, source: Path, chat_template: str = ""
) -> None:
    """Write a model in Hugging Face layout, with the config and tokenizer files of `source`, in the config's dtype.

    A `chat_template` file given in place of the source's own goes along. Safetensors of at most 5 GB each, with an
    index where there are several; tensor after tensor leaves the devices.
    """
    scratch = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    dtype = FILE_DTYPES[config.file_dtype]
    sizes = [
        (name, row, number, math.prod(file_shape(row, config)) * np.dtype(dtype).itemsize)
        for row in jax.tree.leaves(parameter_table(config))
        for number, name in enumerate(file_names(row, config))
    ]
    shards: list[list[Any]] = [[]]
    for entry in sizes:
        if shards[-1] and sum(size for *_, size in shards[-1]) + entry[-1] > SHARD_BYTES:
            shards.append([])
        shards[-1].append(entry)
    leaf_of = dict(zip(jax.tree.leaves(parameter_table(config)), jax.tree.leaves(params), strict=True))
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: file_tensor(leaf_of[row], row, layer, config, dtype) for name, row, layer, _ in shard}
        write_safetensors(scratch / file, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(size for *_, size in sizes)}, "weight_map": weight_map}
        (scratch / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    for name in ("config.json", *TOKENIZER_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, scratch / name)
    if chat_template:
        shutil.copyfile(chat_template, scratch / "chat_template.jinja")
    for path in (*scratch.iterdir(), scratch):
        sync(path)
    replace_directory(scratch, directory)


def file_tensor(leaf: Array, row: Parameter, layer: int, config: ModelConfig, dtype: Any) -> np.ndarray:
    """One tensor of the file from a weight in memory: its layer, transposed and merged back, the padding off."""
    axes = row.axes.split()
    if axes[0] == "layer":
        leaf, axes = leaf[layer], axes[1:]
    file_order = [axis for merged in row.file_axes.split() for axis in merged.split("*")]
    whole = np.asarray(jax.device_get(leaf)).transpose([axes.index(axis) for axis in file_order])
    if axes[0] == "vocab":
        whole = whole[: config.vocabulary_size]
    return np.ascontiguousarray(whole.reshape(file_shape(row, config)).astype(dtype))


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write and fsync a file, readable as the umask says (the library makes it private)."""
    save_file(tensors, path, metadata)
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
    sync(path)


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


# Checkpoints of a run


def checkpoint_directory(run_directory: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return run_directory / "checkpoints" / f"step_{step:08}"


def save_checkpoint(directory: Path, state: PyTree[Array], facts: Mapping[str, Any]) -> None:
    """Write the run state: the pieces this process holds as safetensors, and a manifest that describes and hashes them.

    `facts` (step, config, best held-out loss) go into the manifest.
    """
    scratch = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    file = f"shard-{jax.process_index():05}.safetensors"
    tensors: dict[str, np.ndarray] = {}
    described: dict[str, Any] = {}
    for path, leaf in jax.tree.leaves_with_path(state):
        name = leaf_name(path)
        pieces = []
        for shard in leaf.addressable_shards:
            if shard.replica_id == 0:
                begin = [part.indices(size)[0] for part, size in zip(shard.index, leaf.shape, strict=True)]
                key = f"{name}@{','.join(map(str, begin))}"
                tensors[key] = np.asarray(shard.data)
                pieces.append({"file": file, "key": key, "begin": begin, "shape": list(shard.data.shape)})
        described[name] = {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "pieces": pieces}
    write_safetensors(scratch / file, tensors, {"format": "np"})
    manifest = {
        "format": MANIFEST_FORMAT,
        "files": {file: {"bytes": (scratch / file).stat().st_size, "sha256": sha256(scratch / file)}},
        "tensors": described,
        "versions": versions(),
        **facts,
    }
    path = scratch / "manifest.json"
    path.write_text(json.dumps(manifest, indent=1) + "\n")
    sync(path)
    sync(scratch)
    replace_directory(scratch, directory)


def leaf_name(path: tuple[Any, ...]) -> str:
    """A leaf's path in the tree of the state, as params/layers/query."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def sha256(path: Path) -> str:
    """Hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all whole.

    Raises:
        UserError: which file of which step is missing or damaged, and how.
    """
    path = directory / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no readable manifest ({error})") from error
    if manifest.get("format") != MANIFEST_FORMAT:
        raise UserError(f"{path}: format {manifest.get('format')!r}, this version of lacuna reads {MANIFEST_FORMAT}")
    for name, known in manifest["files"].items():
        file = directory / name
        if not file.is_file():
            raise UserError(f"{file}: missing")
        if file.stat().st_size != known["bytes"]:
            raise UserError(f"{file}: {file.stat().st_size} bytes, the manifest says {known['bytes']}")
        if sha256(file) != known["sha256"]:
            raise UserError(f"{file}: its SHA-256 is not the manifest's, so it is damaged")
    return manifest


def load_checkpoint(directory: Path, manifest: Mapping[str, Any], abstract: PyTree) -> PyTree[Array]:
    """The run state in the shapes and shardings of `abstract`, whatever devices it was saved from.

    Raises:
        UserError: a tensor that is missing or of another shape.
    """
    with ExitStack() as stack:
        files = {name: stack.enter_context(safe_open(directory / name, "numpy")) for name in manifest["files"]}

        def load(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Array:
            name = leaf_name(path)
            saved = manifest["tensors"].get(name)
            if saved is None or tuple(saved["shape"]) != leaf.shape:
                found = "missing" if saved is None else f"of shape {tuple(saved['shape'])}"
                raise UserError(f"{directory}: {name} is {found}, this run wants {leaf.shape}; is it another model's?")

            def shard(index: Any) -> np.ndarray:
                bounds = [part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True)]
                whole = np.empty([end - begin for begin, end in bounds], leaf.dtype)
                for piece in saved["pieces"]:
                    copy_overlap(whole, bounds, piece, files[piece["file"]])
                return whole

            return jax.make_array_from_callback(leaf.shape, leaf.sharding, shard)

        return jax.tree.map_with_path(load, abstract)


def copy_overlap(whole: np.ndarray, bounds: list[tuple[int, int]], piece: Mapping[str, Any], file: Any) -> None:
    """Copy into `whole`, which covers `bounds` of a tensor, what a saved piece holds of it."""
    if not bounds:
        whole[...] = file.get_tensor(piece["key"])
        return
    lower = [max(begin, first) for (begin, _), first in zip(bounds, piece["begin"], strict=True)]
    upper = [
        min(end, first + size) for (_, end), first, size in zip(bounds, piece["begin"], piece["shape"], strict=True)
    ]
    if all(low < high for low, high in zip(lower, upper, strict=True)):
        inside = tuple(
            slice(low - begin, high - begin) for low, high, (begin, _) in zip(lower, upper, bounds, strict=True)
        )
        saved = tuple(
            slice(low - begin, high - begin) for low, high, begin in zip(lower, upper, piece["begin"], strict=True)
        )
        whole[inside] = file.get_slice(piece["key"])[saved]


def saved_steps(run_directory: Path) -> list[int]:
    """Steps of a run's checkpoints, oldest first."""
    names = (path.name for path in (run_directory / "checkpoints").glob("step_*"))
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"step_(\d{8})", name)))


def newest_good(run_directory: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint of a run and its manifest, none where none was saved; damaged ones are named.

    Raises:
        UserError: there are checkpoints, but none is whole.
    """
    steps = saved_steps(run_directory)
    for step in reversed(steps):
        directory = checkpoint_directory(run_directory, step)
        try:
            return directory, read_manifest(directory)
        except UserError as error:
            print(f"checkpoint passed over: {error}", file=sys.stderr)
    if steps:
        raise UserError(f"{run_directory}: none of its {len(steps)} checkpoints is whole; start anew with --overwrite")
    return None


def remove_old(run_directory: Path, keep: int) -> None:
    """Remove what a kill left half-written and all checkpoints but the newest `keep` and the best."""
    checkpoints = run_directory / "checkpoints"
    for leftover in (*checkpoints.glob("*.tmp"), *checkpoints.glob("*.old")):
        shutil.rmtree(leftover)
    best = (run_directory / "best").resolve()
    for step in saved_steps(run_directory)[:-keep]:
        if (directory := checkpoint_directory(run_directory, step)).resolve() != best:
            shutil.rmtree(directory)


def mark_best(run_directory: Path, directory: Path) -> None:
    """Let `best` point to a checkpoint of the run."""
    link = run_directory / "best.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(directory.relative_to(run_directory))
    os.replace(link, run_directory / "best")
