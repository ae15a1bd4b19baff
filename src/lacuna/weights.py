"""Tensors in safetensors files, whole or in pieces, and a model's weights among them, in Hugging Face layout."""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr
from jaxtyping import Array, PyTree
from safetensors import SafetensorError, safe_open

from lacuna.config import UserError
from lacuna.distributed import AXIS_RULES, ROW_AXES
from lacuna.documents import progress
from lacuna.metrics import file_hash
from lacuna.model import (
    EMBEDDING,
    HEAD,
    MATRICES,
    MODULES,
    VOCABULARY,
    Lora,
    ModelConfig,
    Parameter,
    TrainedRows,
    is_quantised,
    parameter_table,
    partition_spec,
    shape_of,
    trained_table,
)
from lacuna.quantised import BLOCK, DYNAMIC_MAP, NORMAL_MAP, OUTER_BLOCK, Quantised, check_blocks, quantise
from lacuna.tokenizer import read_json

READ_DTYPES = {
    "F64": np.float32, "F32": np.float32, "BF16": np.float32, "F16": np.float32, "U8": np.uint8, "I8": np.int8,
}  # fmt: skip
DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int32": "I32"}  # ours, in a file's header
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
BLOCK_ROWS = 4096
SHARD_BYTES = 5 * 10**9
LISTED = 10
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_PREFIX = "base_model.model."  # of tensors' names in PEFT's files
STATE = "quant_state.bitsandbytes__nf4"
BESIDE = (STATE, "weight_format")  # what bitsandbytes says of a weight
leaf_name = partial(keystr, simple=True, separator="/")
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
    def form(self) -> tuple[int | str, ...]:
        """The shape, and the dtype where it is that of quantised weights."""
        return self.shape if self.dtype == np.float32 else (*self.shape, self.dtype.name)

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

    @property
    def stored_dtype(self) -> Any:
        """The dtype in its file, but float32 for float64."""
        names = {name: dtype for dtype, name in DTYPE_NAMES.items()}
        return jnp.dtype(names.get(self.pieces[0][1].get_dtype(), "float32"))

    def equals(self, other: "StoredTensor") -> bool:
        """Whether another tensor has the same values; both are read in blocks of rows."""
        if self.shape != other.shape:
            return False
        rows, *rest = whole(self.shape)
        boxes = [((at, min(at + BLOCK_ROWS, rows[1])), *rest) for at in range(0, rows[1], BLOCK_ROWS)]
        return all(np.array_equal(self.read(box), other.read(box)) for box in boxes)

    def placed(self, leaf: jax.ShapeDtypeStruct) -> Array:
        """The tensor in the shape and sharding of `leaf`, each device reading only its part."""
        assert leaf.sharding
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: self.read(shard_box(index, leaf.shape))
        )

    def __getitem__(self, layer: int) -> np.ndarray:
        return self.read(((layer, layer + 1), *whole(self.shape[1:])))[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.read(whole(self.shape))


def open_tensors(paths: Iterable[Path]) -> dict[str, StoredTensor]:
    """Every tensor of safetensors files by name; a key such as `name@64,0` is of a piece that begins at that index.

    Floats are read as float32; only pieces may be int32, as a run's counters are, and bytes are of quantised weights.

    Raises:
        UserError: a file is missing or damaged, or the pieces of a tensor do not make it up.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        try:
            file = safe_open(path, "numpy")
            for key in file.keys():
                name, is_piece, begin = key.partition("@")
                piece = file.get_slice(key)
                shape, kind = piece.get_shape(), piece.get_dtype()
                first = map(int, begin.split(",")) if begin else [0] * len(shape)
                box = tuple((start, start + size) for start, size in zip(first, shape, strict=True))
                dtype = READ_DTYPES.get(kind, np.int32 if is_piece and kind == "I32" else None)
                if dtype is None:
                    raise UserError(f"{path}: {name} is stored as {kind}; float32, bfloat16 and float16 are read")
                tensors.setdefault(name, StoredTensor(np.dtype(dtype), [])).pieces.append((box, piece))
        except UserError:
            raise
        except (OSError, SafetensorError, ValueError) as error:
            is_pointer = path.is_file() and path.stat().st_size < 999 and b"https://git-lfs" in path.read_bytes()
            reason = f"damaged or not safetensors ({error}); copy or fetch the file again"
            raise UserError(f"{path}: {'a Git LFS pointer; run `git lfs pull`' if is_pointer else reason}") from error
    for name, tensor in tensors.items():
        if not tensor.is_whole:
            where = sorted(box for box, _ in tensor.pieces)
            raise UserError(f"{path.parent}: the pieces of {name}, at {where}, do not make it up exactly once")
    return tensors


def header_facts(path: Path) -> dict[str, str]:
    """What a safetensors file says besides its tensors; nothing if there is no such file, or a damaged one."""
    if not path.is_file():
        return {}
    try:
        with safe_open(path, "numpy") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):  # it is raised again when its tensors are read
        return {}


def copied_pieces(arrays: PyTree[Array], shapes: PyTree) -> dict[str, np.ndarray]:
    """Copies of those pieces of arrays that this process writes, by their names for `open_tensors`: the array's path in
    the tree and the piece's first index.

    Every element is in one piece, written by one process; rows that pad the vocabulary are in none.
    """
    for leaf in jax.tree.leaves(arrays):
        leaf.copy_to_host_async()
    copies = {}
    for (path, leaf), wanted in zip(jax.tree.leaves_with_path(arrays), jax.tree.leaves(shapes), strict=True):
        for shard in leaf.addressable_shards:
            held = shard_box(shard.index, leaf.shape)
            if shard.replica_id == 0 and (box := overlap(held, whole(wanted.shape))) is not None:
                key = f"{leaf_name(path)}@{','.join(str(begin) for begin, _ in box)}"
                copies[key] = np.array(np.asarray(shard.data)[within(box, held)])
    return copies


# Weights in Hugging Face layout


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory is a state of a run, rather than a model in Hugging Face layout."""
    return (directory / "manifest.json").is_file()


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model, single or with an index, of an adapter, or of a checkpoint.

    Raises:
        UserError: there are none or not all, or there are both and they differ, or the index is damaged.
    """
    if is_checkpoint(directory):
        return sorted(directory.glob("shard-*.safetensors"))
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if not index.is_file():
        if not single.is_file() and (directory / ADAPTER_WEIGHTS).is_file():
            return [directory / ADAPTER_WEIGHTS]
        if not single.is_file():
            raise UserError(f"{directory}: {without_weights(directory, os.listdir(directory))}")
        return [single]
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise UserError(f"{index}: no index of safetensors files; fetch the file again")
    names = sorted(set(named.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise UserError(f"{index}: names the file {outside[0]!r}, which is not in the same directory")
    paths = [directory / name for name in names]
    missing = [path for path in paths if not path.is_file()]
    if single.is_file() and single not in paths:
        one, other = open_tensors([single]), {} if missing else open_tensors(paths)
        if one.keys() != other.keys() or not all(one[name].equals(other[name]) for name in one):
            raise UserError(f"{single} and the files of {index.name} are both there and differ; remove what is stale")
    if missing:
        raise UserError(f"{missing[0]}: no such file, but {index.name} names it; fetch it again")
    return paths


def without_weights(directory: Path, names: Sequence[str]) -> str:
    """Why files of these names are no weights that can be read, and what to do; `directory` holds the small ones."""
    found = sorted(name for name in names if Path(name).name == name)
    if ADAPTER in found:
        return f"{ADAPTER} is there, but no {ADAPTER_WEIGHTS}; save the adapter again as safetensors"
    if shards := [name for name in found if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]:
        return f"{shards[0]} is there, but no model.safetensors.index.json; fetch that too"
    if others := [name for name in found if name.endswith(".safetensors")]:
        return f"{others[0]} is there, but no model.safetensors; if these are the weights, rename the file"
    if any(Path(name).suffix in PICKLED for name in found):
        loader = f"transformers' AutoModelForCausalLM.from_pretrained({str(directory)!r}).save_pretrained(…)"
        return f"pickled weights are never read; convert them with {loader}"
    return "no model.safetensors; to train from random weights, add --from-scratch"


def model_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model's files by its name in transformers, without the prefix of a wrapper.

    torch.compile writes `_orig_mod.`, for example, and a body that was saved alone lacks `model.`.
    """
    tensors = open_tensors(weight_files(directory))
    body, embedding = "model.", EMBEDDING.file_name.removeprefix("model.")
    prefixes = [name.removesuffix(embedding) for name in tensors if name.endswith(embedding)]
    if len(prefixes) != 1 or prefixes == [body]:
        return tensors
    (prefix,), outer = prefixes, prefixes[0].removesuffix(body)

    def plain(name: str) -> str:
        is_within = name.startswith(prefix) and name != HEAD.file_name
        return body + name.removeprefix(prefix) if is_within else name.removeprefix(outer)

    renamed = {plain(name): tensor for name, tensor in tensors.items()}
    return renamed if len(renamed) == len(tensors) else tensors


def has_own_head(directory: Path) -> bool:
    """Whether a model's files, if they are there, hold a head that is not the embedding."""
    try:
        tensors = model_tensors(directory)
    except UserError:  # it is raised again if they are loaded
        return False
    head, embedding = tensors.get(HEAD.file_name), tensors.get(EMBEDDING.file_name)
    return head is not None and embedding is not None and not head.equals(embedding)


def load_params(directory: Path, model: ModelConfig, mesh: Mesh, as_stored: bool = False) -> PyTree[Array]:
    """All weights of a model, or those of its adapter, if it has one, from `directory`, each device reading only its
    part: in float32, or as they are stored.

    Raises:
        UserError: no weights, or tensors that are missing, unknown or of another shape (the first ten of each).
    """
    tensors, (rows, shape) = checked_tensors(directory, model), jax.tree.flatten(file_table(model))
    with progress() as line:
        shown = line.track(rows, description="Loading weights")
        return jax.tree.unflatten(shape, [load_parameter(row, tensors, model, mesh, as_stored) for row in shown])


def files_digest(paths: Iterable[Path]) -> str:
    """A hash of the content of files, which are read once for all while they have the same size and time."""
    return digest_of(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths))


@lru_cache
def digest_of(files: tuple[tuple[Path, int, int], ...]) -> str:
    """A hash of files, given with their sizes and times."""
    digest = hashlib.sha256()
    with progress() as line:
        for path, *_ in line.track(files, description="Hashing weights"):
            digest.update(bytes.fromhex(file_hash(path)))
    return digest.hexdigest()


def checked_tensors(directory: Path, model: ModelConfig) -> dict[str, StoredTensor]:
    """The tensors in a directory that config.json asks for, or of an adapter in PEFT's layout adapter_config.json.
    Raises UserError as `load_params` does."""
    if model.is_adapter:
        path = directory / ADAPTER_WEIGHTS
        if not path.is_file():
            raise UserError(f"{directory}: {without_weights(directory, os.listdir(directory))}")
        tensors = {name.removeprefix(ADAPTER_PREFIX): tensor for name, tensor in open_tensors([path]).items()}
        check_tensors(directory, trained_table(model), model, tensors, ADAPTER)
        return tensors
    tensors = model_tensors(directory)
    if model.is_tied:  # some files repeat the embedding as the head; old ones also hold the rotary table
        tensors.pop(HEAD.file_name, None)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    check_tensors(directory, parameter_table(model), model, tensors, "config.json")
    return tensors


def base_of(model: ModelConfig) -> ModelConfig:
    """The model under an adapter."""
    return replace(model, lora=None, trained_rows=())


def file_table(model: ModelConfig) -> PyTree[Parameter]:
    """What the files of a model hold, or of an adapter."""
    return trained_table(model) if model.is_adapter else parameter_table(model)


def check_tensors(
    directory: Path, table: PyTree[Parameter], model: ModelConfig, tensors: Mapping[str, StoredTensor], config: str
) -> None:
    """Refuse files that do not hold exactly the tensors that their config, the file of that name, asks for."""
    found = {name: tensor.form for name, tensor in tensors.items() if not name.endswith(BESIDE)}
    wanted = {
        name: form
        for row in jax.tree.leaves(table)
        for weight in file_names(row, model)
        for name, form in file_forms(weight, row, model).items()
    }
    wrong = [name for name, shape in wanted.items() if found.get(name) != shape]
    unknown = [name for name in found if name not in wanted]
    if wrong or unknown:
        lines = [
            f"{name}: {found.get(name, 'missing')} in the files, {wanted.get(name, 'unknown')} by {config}"
            for name in wrong[:LISTED] + unknown[:LISTED]
        ]
        more = [f"… and {len(names) - LISTED} more" for names in (wrong, unknown) if len(names) > LISTED]
        fix = "do they belong together?"
        if wrong == [HEAD.file_name] and HEAD.file_name not in found and not unknown:
            fix = "if the embedding is the head, set tie_word_embeddings to true"
        listed = "\n  ".join(lines + more)
        raise UserError(f"{directory}: the weights do not fit {config}; {fix}\n  {listed}")


# What adapter_config.json may say besides what shapes the adapter: it changes nothing in what the adapter computes
SILENT_KEYS = (
    "peft_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "r",
    "lora_alpha", "target_modules", "use_rslora", "lora_dropout", "eva_config", "megatron_core", "qalora_group_size",
    "runtime_config", "ensure_weight_tying", "trainable_token_indices",
)  # fmt: skip
# Of other keys the values that change nothing, if there are any; to load an adapter that began as another, say by
# PiSSA (Meng et al. 2024), peft changes the base
SILENT_VALUES: dict[str, tuple[Any, ...]] = {
    "bias": ("none",), "task_type": ("CAUSAL_LM",), "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
}  # fmt: skip


def read_lora(directory: Path) -> Lora | None:
    """The adapter that `directory/adapter_config.json` describes, in PEFT's form; None if it has but rows of tokens.

    Raises:
        UserError: another kind of adapter, or something that is not supported, by name.
    """
    path = directory / ADAPTER
    stated = read_json(path)
    if (kind := stated.get("peft_type")) != "LORA":
        raise UserError(f"{path}: peft_type {kind!r} is not supported; supported is LORA")
    for key, value in stated.items():
        if value and key not in SILENT_KEYS and value not in SILENT_VALUES.get(key, ()):
            raise UserError(
                f"{path}: {key} = {value!r} is not supported; merge the adapter by peft's merge_and_unload() and "
                "save_pretrained(…)"
            )
    if stated.get("r") == 0 and stated.get("trainable_token_indices"):
        return None
    if stated.get("r") == 0:
        raise UserError(f"{path}: r = 0, so the adapter changes nothing; name its base instead, or correct r")
    targets: Any = stated.get("target_modules")
    places = {row.file_name: row.module for row in MATRICES.values()}
    try:
        if isinstance(targets, str):
            is_chosen = partial(re.fullmatch, targets) if targets != "all-linear" else bool
            found = [
                module for name, module in places.items() if is_chosen(f"model.layers.0.{name}"[: -len(".weight")])
            ]
        else:
            found = sorted({target.split(".")[-1] for target in targets}, key=list(places.values()).index)
        return Lora(int(stated["r"]), float(stated["lora_alpha"]), bool(stated.get("use_rslora")), tuple(found))
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise UserError(
            f"{path}: r, lora_alpha and target_modules = {targets!r} should be numbers and some of "
            f"{', '.join(MODULES)} ({error})"
        ) from error


def check_rank(lora: Lora, model: ModelConfig) -> None:
    """Refuse a rank that no change of one of the matrices can have."""
    widths = {min(file_shape(MATRICES[MODULES[module]], model)): module for module in lora.targets}
    if lora.rank > (narrow := min(widths)):
        raise UserError(
            f"lora_rank = {lora.rank}, but {widths[narrow]} has a side of {narrow}, and so has no change of more than "
            f"that rank; set lora_rank to {narrow} or less"
        )


def read_trained_rows(directory: Path) -> TrainedRows:
    """The `trained_rows` of the adapter that `directory/adapter_config.json` describes, in PEFT's form."""
    given: Any = read_json(directory / ADAPTER).get("trainable_token_indices") or {}
    given = given if isinstance(given, dict) else {EMBEDDING.module: given}
    names = {row.module: name for name, row in VOCABULARY.items()}
    try:
        rows = {names[module.split(".")[-1]]: tuple(map(int, ids)) for module, ids in given.items()}
        if any(min(ids) < 0 or len({*ids}) < len(ids) for ids in rows.values()):
            raise ValueError("one is negative, or there twice")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{directory / ADAPTER}: trainable_token_indices = {given!r} should be tokens, of {' and '.join(names)} "
            f"({error})"
        ) from error
    return tuple(sorted(rows.items()))


def adapter_config(model: ModelConfig, base_name: str) -> str:
    """The text of adapter_config.json in PEFT's form; a commit that `base_name` names becomes its revision."""
    name, _, revision = base_name.partition("@") if not Path(base_name).exists() else (base_name, "", "")
    lora, rows = (
        model.lora or Lora(0, 1.0, True, ()),
        {VOCABULARY[name].module: ids for name, ids in model.trained_rows},
    )
    stated = {
        "base_model_name_or_path": name, "revision": revision or None, "peft_type": "LORA", "task_type": "CAUSAL_LM",
        "inference_mode": True, "r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.is_stabilised,
        "target_modules": list(lora.targets), "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "trainable_token_indices": (rows.get(EMBEDDING.module) if model.is_tied else rows) or None,
    }  # fmt: skip
    return json.dumps(stated, indent=2) + "\n"


def file_names(row: Parameter, model: ModelConfig) -> list[str]:
    """Names of a row's tensors in the file."""
    if not row.has_layers:
        return [row.file_name]
    return [f"model.layers.{layer}.{row.file_name}" for layer in range(model.layers)]


def file_shape(row: Parameter, model: ModelConfig) -> tuple[int, ...]:
    """Shape of each of a row's tensors in the file, where the vocabulary is not padded."""
    sizes = model.sizes | {"vocab": model.vocabulary_size}
    return tuple(math.prod(sizes[axis] for axis in merged.split("*")) for merged in row.file_axes.split())


def file_forms(name: str, row: Parameter, model: ModelConfig) -> dict[str, tuple[int | str, ...]]:
    """The form of each tensor that a weight has in the file, by its name there."""
    shape = file_shape(row, model)
    if not (model.file_bits and is_quantised(row, model)):
        return {name: shape}
    if model.file_bits == 8:
        return {name: (*shape, "int8"), name.removesuffix("weight") + "SCB": shape[:1]}
    blocks = math.prod(shape) // BLOCK
    forms = {name: (math.prod(shape) // 2, 1, "uint8"), f"{name}.quant_map": (len(NORMAL_MAP),)}
    if model.scale_bits != 8:
        return forms | {f"{name}.absmax": (blocks,)}
    nested = {"absmax": (math.ceil(blocks / OUTER_BLOCK),), "quant_map": (len(DYNAMIC_MAP),)}
    return (
        forms | {f"{name}.absmax": (blocks, "uint8")} | {f"{name}.nested_{key}": form for key, form in nested.items()}
    )


def file_order(row: Parameter) -> list[str]:
    """Axes of a row's tensors in the file, merged ones apart."""
    return row.file_axes.replace("*", " ").split()


def load_parameter(
    row: Parameter, tensors: Mapping[str, StoredTensor], model: ModelConfig, mesh: Mesh, as_stored: bool = False
) -> Array | Quantised:
    """One weight over the mesh; each shard reads its part of each layer's tensor."""
    if is_quantised(row, model):
        return load_quantised(row, model, mesh, partial(layer_of_file, row, tensors, model, mesh))
    shape, names = shape_of(row, model.sizes), file_names(row, model)
    dtype = tensors[names[0]].stored_dtype if as_stored else np.float32

    def shard(index: Any) -> np.ndarray:
        spans = dict(zip(row.axes.split(), shard_box(index, shape), strict=True))
        layers = slice(*spans.pop("layer", (0, 1)))
        parts = [from_file(tensors[name], row, spans).astype(dtype, copy=False) for name in names[layers]]
        return np.stack(parts) if row.has_layers else parts[0]

    return jax.make_array_from_callback(shape, NamedSharding(mesh, partition_spec(row)), shard)


@lru_cache
def abstract_quantised(row: Parameter, model: ModelConfig, mesh: Mesh) -> Quantised:
    """Shapes and shardings of a stacked weight in 8 or 4 bits: it lies over the mesh as the matrix would, with outer
    scales whole on each device.

    Raises:
        UserError: its rows are no whole blocks of 4 bits on a device.
    """
    shape, axes = file_shape(row, model), [merged.split("*") for merged in row.file_axes.split()]
    over = [AXIS_RULES.get(first) for first, *_ in axes]
    if model.bits == 4:
        check_blocks(row.file_name, shape[1], mesh.shape[over[1]] if over[1] else 1)
    outputs = tuple(model.sizes[axis] for axis in axes[0])
    made = partial(quantise, bits=model.bits, outputs=outputs, nested=model.scale_bits == 8)
    one = jax.eval_shape(made, jax.ShapeDtypeStruct(shape, np.float32))
    first, second = (None if axis in ROW_AXES else axis for axis in over)

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        is_sharded = leaf is one.codes or leaf is one.scale
        spec = PartitionSpec(None, *over[: leaf.ndim]) if is_sharded else PartitionSpec()
        return jax.ShapeDtypeStruct((model.layers, *leaf.shape), leaf.dtype, sharding=NamedSharding(mesh, spec))

    return replace(jax.tree.map(placed, one), over=(first, second))


def load_quantised(
    row: Parameter, model: ModelConfig, mesh: Mesh, read: Callable[[int], Quantised | Array | np.ndarray]
) -> Quantised:
    """A weight of all layers in 8 or 4 bits, each layer quantised as it is read; one at a time is besides."""
    wanted = abstract_quantised(row, model, mesh)
    over = NamedSharding(mesh, PartitionSpec(*wanted.codes.sharding.spec[1:]))

    def placed(layer: Any) -> Quantised | Array:
        is_read = isinstance(layer, np.ndarray)
        return jax.make_array_from_callback(layer.shape, over, layer.__getitem__) if is_read else layer

    with jax.set_mesh(mesh), progress() as line:
        stack = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), wanted)
        for at in line.track(range(model.layers), description=f"Quantising {row.module}"):
            stack = jax.block_until_ready(put_layer(wanted)(stack, placed(read(at)), at))
    return stack


@lru_cache
def put_layer(wanted: Quantised) -> Any:
    """A function, compiled once, that puts a layer into a stack of these shapes and shardings, quantised if it is not
    yet."""

    def put(stack: Quantised, layer: Quantised | Array, at: Array) -> Quantised:
        if not isinstance(layer, Quantised):
            layer = quantise(layer, wanted.bits, wanted.outputs)
        layer = replace(layer, over=wanted.over)
        return jax.tree.map(lambda whole, part: whole.at[at].set(part), stack, layer)

    return jax.jit(put, donate_argnums=0, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, wanted))


def layer_of_file(
    row: Parameter, tensors: Mapping[str, StoredTensor], model: ModelConfig, mesh: Mesh, layer: int
) -> Quantised | Array:
    """A layer's matrix in the file's axes: in float32, or as bitsandbytes left it, each device reading its part.

    Raises:
        UserError: its blocks or the values of its codes are not those of bitsandbytes.
    """
    name, wanted = file_names(row, model)[layer], abstract_quantised(row, model, mesh)
    if not model.file_bits:
        over = NamedSharding(mesh, PartitionSpec(*wanted.codes.sharding.spec[1:]))
        return tensors[name].placed(jax.ShapeDtypeStruct(file_shape(row, model), np.float32, sharding=over))

    def placed(key: str, stacked: jax.ShapeDtypeStruct) -> Array:
        """A tensor that lies flat in the file, in its shape, each device reading the rows it needs."""
        shape, tensor = stacked.shape[1:], tensors[key]
        stride = math.prod(shape[1:]) * tensor.shape[0] // math.prod(shape)

        def read(index: Any) -> np.ndarray:
            (first, last), *rest = shard_box(index, shape)
            values = tensor.read(((first * stride, last * stride), *whole(tensor.shape[1:])))
            return values.reshape(-1, *shape[1:])[:, *(slice(*span) for span in rest)]

        sharding = NamedSharding(mesh, PartitionSpec(*stacked.sharding.spec[1:]))
        return jax.make_array_from_callback(shape, sharding, read)

    codes = placed(name, wanted.codes)
    if wanted.bits == 8:
        stem = name.removesuffix("weight")
        if (form := tensors.get(f"{stem}weight_format")) is not None and np.asarray(form).any():
            raise UserError(f"{stem}weight_format is not 0, so the weight's order is not that of rows")
        return replace(wanted, codes=codes, scale=placed(f"{stem}SCB", wanted.scale))
    made = replace(wanted, codes=codes, scale=placed(f"{name}.absmax", wanted.scale))
    state = json.loads(np.asarray(tensors[f"{name}.{STATE}"]).tobytes()) if f"{name}.{STATE}" in tensors else {}
    facts = {"blocksize": BLOCK} | ({"nested_blocksize": OUTER_BLOCK} if wanted.offset is not None else {})
    if other := [f"{key} = {state.get(key)}" for key, value in facts.items() if state.get(key) != value]:
        raise UserError(f"{name}: {STATE} has {', '.join(other)}, but {facts} are read")
    maps = {"quant_map": NORMAL_MAP} | ({"nested_quant_map": DYNAMIC_MAP} if wanted.offset is not None else {})
    for key, values in maps.items():
        if not np.allclose(tensors[f"{name}.{key}"], values, rtol=0, atol=1e-6):
            raise UserError(f"{name}.{key}: other values than those of bitsandbytes, so its codes can't be read")
    if wanted.offset is None:
        return made
    offset = jnp.float32(state["nested_offset"])
    return replace(made, outer_scale=placed(f"{name}.nested_absmax", wanted.outer_scale), offset=offset)


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
    if row.has_layers:
        leaf, axes = leaf[layer], axes[1:]
    values = np.asarray(leaf).transpose([axes.index(axis) for axis in file_order(row)])
    if "vocab" in axes:
        values = values[: model.vocabulary_size]
    return values.reshape(file_shape(row, model)).astype(dtype)


def write_weights(scratch: Path, params: PyTree, model: ModelConfig, facts: Mapping[str, str]) -> None:
    """Write the safetensors files of a model, or of an adapter in PEFT's layout; `facts` go into their headers."""
    from huggingface_hub import split_state_dict_into_shards_factory

    dtype, table = jnp.dtype("float32" if model.is_adapter else model.file_dtype), trained_table(model)
    tensors = {
        ADAPTER_PREFIX * model.is_adapter + name: (leaf, row, layer)
        for row, leaf in zip(jax.tree.leaves(table), jax.tree.structure(table).flatten_up_to(params), strict=True)
        for layer, name in enumerate(file_names(row, model))
    }
    shapes = {name: (dtype, file_shape(row, model)) for name, (_, row, _) in tensors.items()}
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (_, shape) in shapes.items()}
    stem = ADAPTER_WEIGHTS.removesuffix(".safetensors") if model.is_adapter else "model"
    files = split_state_dict_into_shards_factory(
        sizes, get_storage_size=int, filename_pattern=stem + "{suffix}.safetensors", max_shard_size=SHARD_BYTES
    )
    if files.is_sharded:
        index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
        (scratch / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    for file, names in files.filename_to_tensors.items():
        values = (file_tensor(*tensors[name], model, dtype) for name in names)
        write_safetensors(scratch / file, {name: shapes[name] for name in names}, values, facts)


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    tensors: Iterable[np.ndarray],
    facts: Mapping[str, str] | None = None,
) -> str:
    """Write and sync tensors one by one in the order of `shapes`; the file's SHA-256, computed on the way.

    The library's own writer wants a second copy of all tensors in memory and blocks every other thread meanwhile.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(facts or {})}}
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
