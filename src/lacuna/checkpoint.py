"""Directories of models and runs: models found and exported, and run states saved beside training and loaded anywhere.

A checkpoint is a directory of safetensors files, one for each process, which hold the pieces of all tensors, and a
manifest that hashes every file, itself included. Directories are written under another name, synced and renamed, so
one with its final name is complete. Nothing is unpickled.
"""

import errno
import json
import math
import os
import re
import shutil
import threading
import time
import tomllib
from collections import deque
from collections.abc import Callable, Generator, Mapping
from concurrent import futures
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, PyTree
from pydantic import BaseModel

from lacuna import weights
from lacuna.attention import choose_backend
from lacuna.config import DataKeys, GrpoConfig, ModelKeys, TemplateKeys, TrainingConfig, UserError, VocabularyKeys
from lacuna.distributed import AXIS_RULES, check_divisible, describe_error, fast_dtype, from_first, is_first, to_first
from lacuna.metrics import byte_size, content_hash, duration, file_hash, sync
from lacuna.model import (
    FAMILIES,
    Lora,
    ModelConfig,
    Parameter,
    is_quantised,
    joined,
    parameter_table,
    partition_spec,
    read_model_config,
    shape_of,
    trained_table,
)
from lacuna.tokenizer import Tokenizer, load_tokenizer, read_json, read_words
from lacuna.weights import StoredTensor, file_tensor, leaf_name

MANIFEST_FORMAT = 3
BASE, BITS = "base_sha256", "base_bits"  # name the hash of the weights under an adapter, and the bits of one
SOURCE = "source"  # in the directory of a run, with what its model has besides weights
FAILURES_IN_A_ROW = 3
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "tokenizer.model",
    "vocab.json", "merges.txt", "added_tokens.json", "generation_config.json",
)  # fmt: skip

Config = TypeVar("Config", bound=ModelKeys)

# Models


def resolve_model(model_name: str, with_weights: bool = True) -> Path:
    """The directory of a model's weights: a local one, the model of one of our runs, a checkpoint of a run, or a hub
    id's, fetched into its cache.

    Raises:
        UserError: no such directory, and no such model on the hub, or the hub can't be reached.
    """
    path = Path(model_name)
    if path.name == "best" and path.is_file():  # in place of a symbolic link
        return best_checkpoint(path.parent)
    if any((path / "model" / name).is_file() for name in ("config.json", weights.ADAPTER)):
        return path / "model"
    has_run = (path / "config.toml").is_file()
    if (has_run or path.name == "checkpoints" or not path.exists()) and (near := checkpoints_near(path)):
        unended = "a run that has not ended, so it has no model yet; continue it with --resume"
        raise UserError(f"{path}: {unended if has_run else 'no such checkpoint'}; {near}")
    if path.is_dir():
        return path
    import huggingface_hub
    from huggingface_hub import errors

    wanted = ["config.json", weights.ADAPTER, *TOKENIZER_FILES]
    if with_weights:
        wanted += ["model*.safetensors", "model.safetensors.index.json", weights.ADAPTER_WEIGHTS]
    name, _, revision = model_name.partition("@")
    at: dict[str, Any] = {"repo_id": name, "revision": revision or None}
    try:
        found = Path(huggingface_hub.snapshot_download(**at, allow_patterns=wanted, ignore_patterns="*/*"))
        if not with_weights or any(found.glob("*.safetensors")):
            return found
        names = huggingface_hub.list_repo_files(**at)
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
    raise UserError(f"model_name {model_name!r}: {weights.without_weights(found, names)}")


def settled(config: Config, platform: str = "") -> Config:
    """The config with what it leaves open decided for good, or as the run that it resumes decided it: the commit of a
    hub id, the type of compute on this platform (this machine's, if it is empty), and what the model has room for.

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
    place = find_model(config.model_copy(update={"model_name": name}), with_weights=False)
    if not Path(name).exists() and name != known:
        name = f"{name.partition('@')[0]}@{place.source.name}"
    changes["model_name"] = name
    if isinstance(config, TrainingConfig):
        changes |= keys_of_lora(weights.read_lora(place.adapter) if place.base else None, config)
    if config.compute_dtype == "auto":
        changes["compute_dtype"] = before.get("compute_dtype", fast_dtype(config, platform or jax.default_backend()))
    if isinstance(config, DataKeys) and "sequence_length" not in config.model_fields_set:
        allowed = read_model_config(place.described).capacity(config.sequence_length)
        changes["sequence_length"] = length = before.get("sequence_length", allowed)
        if isinstance(config, GrpoConfig) and "max_completion_tokens" not in config.model_fields_set:
            fitting = min(config.max_completion_tokens, length // 2)
            changes["max_completion_tokens"] = before.get("max_completion_tokens", fitting)
    return config.model_copy(update=changes)


class Place(NamedTuple):
    """Where a model lies: its weights, the directories with its config.json and its tokenizer, and, if the weights are
    an adapter's, the directory with adapter_config.json and the weights of its base; by which name that was found."""

    source: Path
    described: Path
    tokenizer: Path
    adapter: Path
    base: Path | None
    base_name: str


def at(directory: Path) -> Place:
    """A model all of which lies in one directory."""
    return Place(directory, directory, directory, directory, None, str(directory))


def find_model(config: ModelKeys, with_weights: bool = True) -> Place:
    """The parts of the model that a config names, an adapter's base among them.

    Raises:
        UserError: one of them is not there, or the base of an adapter is an adapter itself.
    """
    source = resolve_model(config.model_name, with_weights)
    described = described_in(source)
    if not (described / weights.ADAPTER).is_file():
        if config.base_name:
            raise UserError(f"base_name = {config.base_name!r}, but {source} is no adapter; name only one of them")
        name = str(source.resolve()) if Path(config.model_name).exists() else config.model_name
        return at(described)._replace(source=source, base_name=name)
    stated = read_json(described / weights.ADAPTER)
    name = config.base_name or str(stated.get("base_model_name_or_path") or "")
    if not name:
        raise UserError(f"{described / weights.ADAPTER} names no base_model_name_or_path; add --base-name")
    if stated.get("revision") and not config.base_name and not Path(name).exists():
        name = f"{name}@{stated['revision']}"
    try:
        base = resolve_model(name, with_weights)
    except UserError as error:
        raise UserError(f"{source} is an adapter; its base: {error}; or name where it is by --base-name") from error
    if (described_in(base) / weights.ADAPTER).is_file():
        raise UserError(f"{source} is an adapter, and so is its base {name}; merge that first: lacuna merge")
    own, other = (
        next((place for place in (described, described_in(base)) if (place / file).is_file()), described_in(base))
        for file in ("config.json", "tokenizer.json")
    )
    return Place(source, own, other, described, base, str(base.resolve()) if Path(name).exists() else name)


def keys_of_lora(lora: Lora | None, config: TrainingConfig) -> dict[str, Any]:
    """The keys of a run that goes on training this adapter, if it is given one. Raises UserError if the config asks for
    another one, or says of none what it should be like."""
    if not lora:
        if key := config.idle_key:
            raise UserError(
                f"{key} = {getattr(config, key)!r} is of adapters, and none trains while lora_rank is 0; set lora_rank "
                f"to train them, say to 16, or leave {key} out"
            )
        return {}
    if config.from_scratch:
        raise UserError(
            f"from_scratch = true, but {config.model_name} is an adapter, which needs a trained base; leave it out"
        )
    keys = {
        "lora_rank": lora.rank, "lora_alpha": lora.alpha, "lora_targets": lora.targets,
        "lora_scaling": "stabilised" if lora.is_stabilised else "plain",
    }  # fmt: skip
    for key in keys.keys() & config.model_fields_set:
        if getattr(config, key) != keys[key]:
            raise UserError(
                f"{key} = {getattr(config, key)!r}, but {config.model_name} is an adapter with {keys[key]!r}, which "
                f"this run would go on training; leave {key} out, or merge the adapter first: lacuna merge"
            )
    return keys


def checkpoints_near(path: Path) -> str:
    """Which checkpoints the run has that a path is of or lies in, in words; empty if there is no such run."""
    for run in (path, *(each for each in path.parents[:2] if each.name)):  # hub ids lie in none
        if (config := run / "config.toml").is_file():
            names = [f"step_{step:08}" for step in saved_steps(run)] + ["best"] * best_checkpoint(run).is_dir()
            names += ["model"] * (run / "model").is_dir()
            keep = tomllib.loads(config.read_text()).get("keep")
            return f"{run} has {', '.join(names) or 'none'} (keep = {keep})"
    return ""


def described_in(source: Path) -> Path:
    """The directory of what a model has besides weights: that of its weights, but of a checkpoint one of its run.

    Raises:
        UserError: the checkpoint lies in no run.
    """
    if not weights.is_checkpoint(source):
        return source
    run = next(parent for parent in source.resolve().parents if parent.name != "checkpoints")
    kept = [run / name for name in (SOURCE, "model") if (run / name / "config.json").is_file()]
    if not kept:
        raise UserError(
            f"{source}: its config.json and tokenizer are in {run / SOURCE}, which is not there; restore it"
        )
    return kept[0]


def newest_run(output_dir: str) -> Path:
    """The run in this folder whose model was written last; UserError if there is none."""
    exported = sorted(Path(output_dir).glob("*/model/config.json"), key=lambda path: path.stat().st_mtime)
    if not exported:
        raise UserError(f"{output_dir}: no run with a model in it; give --model-name, or train one first")
    return exported[-1].parents[1]


class OpenedModel(NamedTuple):
    """A model without its weights: their directory, what config.json says (the vocabulary padded and attention chosen
    for the mesh), its tokenizer, the devices, the start-up line about attention, and the parts that it was found in."""

    source: Path
    model: ModelConfig
    tokenizer: Tokenizer
    mesh: Mesh
    attention_line: str
    place: Place

    @property
    def base(self) -> Path | None:
        """The directory of the weights that stay as they are, if they do: where adapters train, or in 8 or 4 bits."""
        return (self.place.base or self.place.source) if self.model.is_frozen else None


def open_model(config: ModelKeys, mesh: Mesh, with_weights: bool = True) -> OpenedModel:
    """The model of a config on a mesh, its parts checked against each other.

    Raises:
        UserError: no such model, or one that is not supported or does not fit the mesh or the config.
    """
    place = find_model(config, with_weights)
    for directory in (place.source, place.base or place.source) if with_weights else ():
        weights.weight_files(directory)  # refused now, if it would be when they are read
    described, tokenizer = place.tokenizer, tokenizer_of(place, config)
    model, attention_line = model_on(place, config, mesh, tokenizer)
    if tokenizer.vocabulary_size > model.vocabulary_size:
        last = str(tokenizer.backend.id_to_token(tokenizer.vocabulary_size - 1))
        files = [path for name in TOKENIZER_FILES if (path := described / name).is_file()]
        raise UserError(
            f"{place.source}: the tokenizer has {tokenizer.vocabulary_size} tokens, the last {last!r} of "
            f"{next((path.name for path in files if last.encode() in path.read_bytes()), 'tokenizer.json')}, and "
            f"config.json's vocab_size is {model.vocabulary_size}; do they belong together?"
        )
    return OpenedModel(place.source, model, tokenizer, mesh, attention_line, place)


def tokenizer_of(place: Place, config: ModelKeys) -> Tokenizer:
    """The tokenizer of a model, with the template and the new words of a config."""
    template: Any = config.template if isinstance(config, TemplateKeys) else ()
    words = read_words(Path(config.new_tokens)) if isinstance(config, VocabularyKeys) and config.new_tokens else ()
    return load_tokenizer(place.tokenizer, *template, words=words)


def model_on(
    place: Place, config: ModelKeys, mesh: Mesh, tokenizer: Tokenizer | None = None
) -> tuple[ModelConfig, str]:
    """A model, grown by the new words of a tokenizer, with its vocabulary padded, its attention chosen for the mesh,
    and its adapter, and a line about attention.

    A head in the files that is not the embedding counts, whatever config.json says, as in transformers and vLLM.

    Raises:
        UserError: the model is not supported, or does not fit the mesh or the config.
    """
    model = read_model_config(place.described)
    tokens = tokenizer.vocabulary_size if tokenizer and tokenizer.new_words else 0
    is_random = isinstance(config, TrainingConfig) and config.from_scratch
    own_head = model.is_tied and not is_random and weights.has_own_head(place.base or place.described)
    is_tied, shards = model.is_tied and not own_head, mesh.shape[AXIS_RULES["vocab"]]
    backend, line = choose_backend(config, mesh, model.head)
    lora, rows = (
        (weights.read_lora(place.adapter), weights.read_trained_rows(place.adapter)) if place.base else (None, ())
    )
    if isinstance(config, TrainingConfig) and config.lora_rank and not place.base:
        lora = Lora(config.lora_rank, config.lora_alpha, config.lora_scaling == "stabilised", config.lora_targets)
        weights.check_rank(lora, model)
    if tokenizer and isinstance(config, VocabularyKeys) and config.new_tokens and (lora or config.train_only):
        ids = {tokenizer.backend.token_to_id(word) or 0 for word in read_words(Path(config.new_tokens))}
        wanted = tuple((name, tuple(sorted(ids))) for name in (["embedding"] if is_tied else ["embedding", "head"]))
        if place.base and lora and config.train_only:
            raise UserError(f"train_only is set, but {place.source} is an adapter, which trains too; leave it out")
        if place.base and rows != wanted:
            raise UserError(
                f"new_tokens = {config.new_tokens}: {place.source} is an adapter with rows of other tokens, or none; "
                "leave new_tokens out, or merge it first: lacuna merge"
            )
        rows = wanted
    grown = max(model.vocabulary_size, tokens, *(1 + max(ids) for _, ids in rows))
    bits = config.base_bits or (stated_base(place.source)[1] if place.base else 0) or model.bits or 16
    if model.file_bits not in (0, bits):
        raise UserError(
            f"base_bits = {bits}, but {place.base or place.source} holds weights of {model.file_bits} bits; leave "
            "base_bits out, or name the model that they were made from"
        )
    model = replace(
        model, is_tied=is_tied, vocabulary_size=grown, padded_vocabulary=math.ceil(grown / shards) * shards,
        attention=backend, lora=lora, bits=bits % 16, trained_rows=rows,
    )  # fmt: skip
    check_divisible(mesh, model.sizes)
    return model, f"{line}; lm_head.weight is not the embedding, so tie_word_embeddings is false" if own_head else line


def opened_params(opened: OpenedModel) -> PyTree[Array]:
    """All weights of a model to compute with, an adapter on its base, each device reading only its part.

    Raises:
        UserError: no weights, damaged ones, or others than config.json asks for; or the base has changed.
    """
    return joined(frozen_params(opened), trained_params(opened), opened.model)


def trained_params(opened: OpenedModel) -> PyTree[Array]:
    """The float32 weights that training changes, from a checkpoint, PEFT's or Hugging Face layout; rows of new words
    are zero."""
    source, mesh, model = opened.source, opened.mesh, opened.model
    if model.is_frozen and not model.is_adapter:
        return {"layers": {}}
    stored = model if model.is_adapter else in_files(model, source)  # without rows of new words
    if weights.is_checkpoint(source):
        shapes = ({"params": abstract_params(each, mesh)} for each in (model, unpadded(stored)))
        return load_checkpoint(source, checked_manifest(source), *shapes)["params"]
    return weights.load_params(source, stored, mesh)


def in_files(model: ModelConfig, source: Path) -> ModelConfig:
    """The model with as many rows of the vocabulary as its files have."""
    return replace(model, vocabulary_size=read_model_config(described_in(source)).vocabulary_size)


def frozen_params(opened: OpenedModel) -> PyTree[Array] | None:
    """The weights under an adapter, in the dtype in which they are stored; None where all weights train.

    Raises:
        UserError: they are not those that the adapter was trained on.
    """
    if not opened.base:
        return None
    check_base(opened.source, opened.base)
    model, mesh, rows = weights.base_of(opened.model), opened.mesh, dict(opened.model.trained_rows)
    stored = in_files(model, opened.base)
    for name in ("embedding",) if model.is_tied else ("embedding", "head"):
        if lacking := {*range(stored.vocabulary_size, model.vocabulary_size)} - {*rows.get(name, ())}:
            raise UserError(f"{opened.base}: its {name} has no row for token {min(lacking)}, nor has {opened.source}")
    if not weights.is_checkpoint(opened.base):
        return weights.load_params(opened.base, stored, mesh, as_stored=True)
    dense = replace(model, bits=0)
    if not model.bits:
        return trained_params(opened._replace(source=opened.base, model=dense))
    checked_manifest(opened.base)

    def load(row: Parameter, leaf: jax.ShapeDtypeStruct, tensor: StoredTensor) -> PyTree[Array]:
        if not is_quantised(row, model):
            return tensor.placed(leaf)
        return weights.load_quantised(
            row, model, mesh, lambda layer: file_tensor(tensor, row, layer, model, np.float32)
        )

    return jax.tree.map(load, parameter_table(model), abstract_params(dense, mesh), saved_params(opened.base, dense))


def check_base(source: Path, base: Path) -> None:
    """Raises UserError if these are not the weights that an adapter states it was trained on."""
    stated = stated_base(source)[0] if source != base else ""
    if stated and stated != weights.files_digest(weights.weight_files(base)):
        raise UserError(
            f"{base}: not the weights that the adapter {source} was trained on, by their SHA-256; restore them, or "
            "name the right ones by --base-name"
        )


def stated_base(source: Path) -> tuple[str, int]:
    """The hash of the base that an adapter was trained on, empty where it is not known, and the bits of a weight there,
    0 where not known, or not quantised."""
    if weights.is_checkpoint(source):
        run = read_manifest(source).run
        return run.inputs.get(BASE, ""), run.model.get("bits", 0)
    facts = weights.header_facts(source / weights.ADAPTER_WEIGHTS)
    return facts.get(BASE, ""), int(facts.get(BITS, 0))


def abstract_params(model: ModelConfig, mesh: Mesh) -> PyTree[jax.ShapeDtypeStruct]:
    """Shapes and shardings of what training changes."""

    def abstract(row: Parameter) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, partition_spec(row))
        return jax.ShapeDtypeStruct(shape_of(row, model.sizes), np.float32, sharding=sharding)

    return jax.tree.map(abstract, trained_table(model))


def abstract_frozen(model: ModelConfig, mesh: Mesh) -> PyTree[jax.ShapeDtypeStruct] | None:
    """Shapes and shardings of the weights that stay as they are, in the dtype that config.json says, or quantised; None
    where all train."""
    if not model.is_frozen:
        return None

    def abstract(row: Parameter, leaf: jax.ShapeDtypeStruct) -> PyTree[jax.ShapeDtypeStruct]:
        if is_quantised(row, model):
            return weights.abstract_quantised(row, model, mesh)
        return leaf.update(dtype=jnp.dtype(model.file_dtype))

    dense = replace(weights.base_of(model), bits=0)
    return jax.tree.map(abstract, parameter_table(model), abstract_params(dense, mesh))


def unpadded(model: ModelConfig) -> ModelConfig:
    """The model as files have it, without the rows that pad the vocabulary in memory."""
    return replace(model, padded_vocabulary=model.vocabulary_size)


def save_model(
    directory: Path,
    params: PyTree,
    model: ModelConfig,
    source: Path,
    facts: Mapping[str, str] | None = None,
    described: Path | None = None,
) -> list[str]:
    """Write a model in Hugging Face layout and the config's dtype, or an adapter in PEFT's, with the config and
    tokenizer files of `source`, or the config of `described`; `facts` go into the headers of the weights.

    Safetensors files hold at most 5 GB each, with an index if there are several; `params`, arrays or stored tensors,
    are read layer by layer. Returns what went wrong once the model was complete.
    """
    scratch = directory.with_name(directory.name + ".tmp")
    try:
        copy_description(source, described or source, scratch, model)
        weights.write_weights(scratch, params, model, facts or {})
        return replace_directory(scratch, directory)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def copy_description(
    source: Path, described: Path, directory: Path, model: ModelConfig, changed: Mapping[str, str] | None = None
) -> None:
    """Copy what a model has besides weights, its config.json from `described`, in place of what lies there; files in
    `changed`, by name, have that text.

    config.json then states what it left out and readers would take to be something else.
    """
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    shutil.copyfile(described / "config.json", directory / "config.json")
    for name in (*TOKENIZER_FILES, *[weights.ADAPTER] * model.is_adapter):
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
    for name, text in (changed or {}).items():
        (directory / name).write_text(text, "utf-8")
    path, family = directory / "config.json", FAMILIES[model.family]
    raw, stated = read_json(path), {"architectures": [family.architecture], "num_key_value_heads": model.kv_heads}
    stated |= {"head_dim": model.head} if model.family == "qwen3" else {}
    changes: dict[str, Any] = {key: value for key, value in stated.items() if not raw.get(key)}
    dtypes = [key for key in ("dtype", "torch_dtype") if raw.get(key)]
    if read_model_config(directory).file_dtype != model.file_dtype:
        changes |= dict.fromkeys(dtypes or ["dtype"], model.file_dtype)
    if raw.get("tie_word_embeddings", family.defaults.get("tie_word_embeddings", False)) != model.is_tied:
        changes["tie_word_embeddings"] = model.is_tied
    if raw["vocab_size"] != model.vocabulary_size:
        changes["vocab_size"] = model.vocabulary_size
    left_out = [key for key in ("quantization_config",) if key in raw and not model.file_bits]
    if changes or left_out:
        kept = {key: value for key, value in (raw | changes).items() if key not in left_out}
        path.write_text(json.dumps(kept, indent=2) + "\n")


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

    `best` is the best held-out loss of pretrain and sft so far, or grpo's best held-out reward, `place` where streamed
    data go on, `worse` how many evaluations in a row were not better than the best.
    """

    step: int
    best: float | None
    wall_seconds: float
    config: dict[str, Any]
    model: dict[str, Any]
    data: tuple[str, ...]
    inputs: dict[str, str] = {}  # of older runs not known
    place: dict[str, Any] = {}
    worse: int = 0
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


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint, itself intact.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if directory.suffix in weights.PICKLED:
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
        near = checkpoints_near(directory) or "name one of a run"
        raise UserError(f"{path}: no manifest, so no checkpoint ({error.strerror}); {near}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
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
            found = file_hash(path)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from error
        if found != sha256:
            raise UserError(f"{path}: its SHA-256 is not the manifest's, so it is damaged")
    open_checkpoint(directory, manifest)
    return manifest


# Run states


def open_checkpoint(directory: Path, manifest: Manifest) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by its path in the state, as params/layers/query."""
    return weights.open_tensors(shard_path(directory, process) for process in range(len(manifest.shards)))


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
        return tensor.placed(leaf)

    return jax.tree.map_with_path(load, abstract, shapes)


def saved_params(directory: Path, model: ModelConfig) -> PyTree[StoredTensor]:
    """The parameters of a checkpoint that this process wrote or checked, each read when needed."""
    saved = open_checkpoint(directory, read_manifest(directory))
    return jax.tree.map_with_path(lambda path, _: saved[f"params/{leaf_name(path)}"], trained_table(model))


def write_pieces(scratch: Path, copies: Mapping[str, np.ndarray], needed: int) -> str:
    """Write this process's file in `scratch`, if there is room for the `needed` bytes of all processes; its SHA-256."""
    path = shard_path(scratch, jax.process_index())
    scratch.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(scratch).free) < needed:
        raise OSError(errno.ENOSPC, f"{byte_size(needed)} are needed, {byte_size(free)} are free", str(path))
    shapes = {key: (values.dtype, values.shape) for key, values in copies.items()}
    return weights.write_safetensors(path, shapes, copies.values())


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
        copies, outcome = weights.copied_pieces(state, shapes), futures.Future[str]()
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

    def report(self, say: Callable[[str], None]) -> None:
        """Say how the saves went that have ended since the last call.

        Raises:
            UserError: the third save in a row has failed.
        """
        while self.saves and self.saves[0].done():
            say(self.saves.popleft().result())

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
