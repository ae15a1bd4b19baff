"""The command convert: a model, wherever it comes from, as other runtimes read it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from lacuna import checkpoint, weights
from lacuna.apps.configs import ConvertConfig
from lacuna.config import ModelKeys, UserError, name_of_model
from lacuna.distributed import describe_error
from lacuna.metrics import byte_size
from lacuna.model import ModelConfig, Parameter, read_model_config, shape_of, trained_table
from lacuna.tokenizer import load_tokenizer

DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
KINDS = {dtype: kind for kind, dtype in DTYPES.items()}


@dataclass(frozen=True)
class FileRow:
    """A row of the parameter table that lies in a model's files; each layer is read when it is asked for."""

    row: Parameter
    tensors: Mapping[str, weights.StoredTensor]
    model: ModelConfig

    def __getitem__(self, layer: int) -> np.ndarray:
        sizes = dict(zip(self.row.axes.split(), shape_of(self.row, self.model.sizes), strict=True))
        spans = {axis: (0, size) for axis, size in sizes.items() if axis != "layer"}
        return weights.from_file(self.tensors[weights.file_names(self.row, self.model)[layer]], self.row, spans)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[0]


@dataclass(frozen=True)
class Merged:
    """A matrix of each layer and the adapter on it, as one matrix in float32."""

    base: Any
    factors: Mapping[str, Any]
    scale: float

    def __getitem__(self, layer: int) -> np.ndarray:
        return self.base[layer] + self.scale * np.tensordot(self.factors["a"][layer], self.factors["b"][layer], 1)


def stored_params(source: Path, model: ModelConfig) -> PyTree:
    """The weights in a model, checkpoint or adapter, in the shape of their tree, each layer read when it is asked for.

    Raises:
        UserError: no weights, damaged ones, or others than their config asks for.
    """
    if weights.is_checkpoint(source):
        checkpoint.checked_manifest(source)
        return checkpoint.saved_params(source, model)
    tensors = (weights.adapter_tensors if model.lora else weights.checked_tensors)(source, model)
    return jax.tree.map(lambda row: FileRow(row, tensors, model), trained_table(model))


def merged_params(place: checkpoint.Place, model: ModelConfig) -> PyTree:
    """The weights of a model, an adapter among them merged into its base, each layer read when it is asked for.

    Raises:
        UserError: as `stored_params`, or the base is not the one that the adapter was trained on.
    """
    params = stored_params(place.base or place.source, replace(model, lora=None))
    if model.lora and place.base:
        checkpoint.check_base(place.source, place.base)
        factors = stored_params(place.source, model)["layers"]
        merged = {name: Merged(params["layers"][name], each, model.lora.scale) for name, each in factors.items()}
        params |= {"layers": params["layers"] | merged}
    return params


def run_convert(config: ConvertConfig) -> None:
    """Write a model as a directory in Hugging Face layout or as one GGUF file, an adapter merged into its base; or an
    adapter in PEFT's layout.

    Raises:
        UserError: no such model, or a damaged one, or one that can't be written so, or there is something already
            where it should go.
    """
    output = Path(config.output)
    if output.exists():
        raise UserError(f"output {config.output!r} is there already; name another")
    place = checkpoint.find_model(ModelKeys(model_name=config.model_name, base_name=config.base_name))
    if config.to == "peft" and not place.base:
        raise UserError(f"model_name {config.model_name!r} is no adapter, so there is nothing for --to peft")
    model = read_model_config(place.described)
    own_head = model.is_tied and weights.has_own_head(place.base or place.source)
    model = replace(
        model, is_tied=model.is_tied and not own_head, lora=weights.read_lora(place.adapter) if place.base else None
    )
    kind = KINDS[model.file_dtype] if config.type == "auto" else config.type
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        if config.to == "peft":
            facts = {checkpoint.BASE: stated} if (stated := checkpoint.stated_base(place.source)) else {}
            facts |= {checkpoint.BITS: str(checkpoint.stated_bits(place.source))}
            params = stored_params(place.source, model)
            lines = checkpoint.save_model(output, params, model, place.adapter, facts, place.described)
            done = "adapter in PEFT's layout"
        elif config.to == "hf":
            params, whole = merged_params(place, model), replace(model, lora=None, file_dtype=DTYPES[kind])
            lines = checkpoint.save_model(output, params, whole, place.tokenizer, None, place.described)
            done = f"{DTYPES[kind]} in Hugging Face layout"
        else:
            done, lines = to_gguf(config, output, merged_params(place, model), replace(model, lora=None), place, kind)
    except OSError as error:
        raise UserError(f"{output} can't be written: {describe_error(error)}") from error
    merged = " merged into its base" if place.base and config.to != "peft" else ""
    print("\n".join([f"{output}: {config.model_name}{merged}, {model.family}, {done}", *lines]))


def to_gguf(
    config: ConvertConfig, output: Path, params: PyTree, model: ModelConfig, place: checkpoint.Place, kind: str
) -> tuple[str, list[str]]:
    """Write a GGUF file; what is in it, and a line for each thing that llama.cpp will do otherwise."""
    try:
        from lacuna.apps import gguf
    except ImportError as error:
        raise UserError("--to gguf needs the package gguf; get it by uv run --extra gguf convert …") from error
    is_here, card = Path(config.model_name).exists(), place.described / "README.md"
    stated = re.match(r"---\n(?:.*\n)*?license: *(\S+)", card.read_text("utf-8")) if card.is_file() else None
    name = name_of_model(Path(config.model_name)) if is_here else config.model_name.partition("@")[0]
    licence = config.license or (stated[1] if stated else "")
    architecture, sizes = gguf.architecture(model, place.described)
    vocabulary = gguf.vocabulary(load_tokenizer(place.tokenizer), model.vocabulary_size)
    keys = {"general.type": "model", "general.name": config.name or name} | gguf.kind_keys(kind)
    keys |= {"general.license": licence} if licence else {}
    keys |= {f"{architecture}.{key}": value for key, value in sizes.items()} | vocabulary.keys
    counts = gguf.write_gguf(output, params, model, keys, architecture, kind)
    listed = ", ".join(f"{count} tensors {name}" for name, count in counts.items())
    return f"{listed} ({byte_size(output.stat().st_size)})", [f"NOTE for llama.cpp: {n}" for n in vocabulary.notes]
