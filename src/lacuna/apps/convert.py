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
from lacuna.distributed import describe_error, make_mesh
from lacuna.linear import Words
from lacuna.metrics import byte_size
from lacuna.model import (
    MATRICES,
    ModelConfig,
    Parameter,
    is_quantised,
    shape_of,
)
from lacuna.quantised import dequantised, quantise
from lacuna.tokenizer import load_tokenizer

DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
KINDS = {dtype: kind for kind, dtype in DTYPES.items()}


@dataclass(frozen=True)
class FileRow:
    """A row of the parameter table that lies in a model's files; each layer is read when it is asked for, and
    dequantised."""

    row: Parameter
    tensors: Mapping[str, weights.StoredTensor]
    model: ModelConfig

    def __getitem__(self, layer: int) -> np.ndarray:
        if is_quantised(self.row, self.model):
            mesh = make_mesh(1, 1, 1, jax.devices()[:1])
            return dequantised_matrix(weights.layer_of_file(self.row, self.tensors, self.model, mesh, layer), self)
        return self.in_memory(self.tensors[weights.file_names(self.row, self.model)[layer]])

    def in_memory(self, tensor: weights.StoredTensor) -> np.ndarray:
        """A tensor of the files in the axes that the row has in memory."""
        sizes = dict(zip(self.row.axes.split(), shape_of(self.row, self.model.sizes), strict=True))
        return weights.from_file(tensor, self.row, {axis: (0, n) for axis, n in sizes.items() if axis != "layer"})

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[0]


def dequantised_matrix(matrix: Any, like: FileRow) -> np.ndarray:
    """A quantised matrix of the files in float32, in the axes that its row has in memory."""
    values = np.asarray(jax.jit(dequantised, static_argnums=1)(matrix, np.float32))
    return like.in_memory(weights.StoredTensor(values.dtype, [(weights.whole(values.shape), values)]))


@dataclass(frozen=True)
class AsTrained:
    """A matrix of each layer as training had it, in 8 or 4 bits and dequantised."""

    base: Any
    row: Parameter
    model: ModelConfig
    bits: int

    def __getitem__(self, layer: int) -> np.ndarray:
        values = weights.file_tensor(self.base, self.row, layer, self.model, np.float32)
        outputs = tuple(self.model.sizes[axis] for axis in self.row.file_axes.split()[0].split("*"))
        matrix = jax.jit(quantise, static_argnums=(1, 2))(values, self.bits, outputs)
        return dequantised_matrix(matrix, FileRow(self.row, {}, self.model))


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
    model = model if model.is_adapter else checkpoint.in_files(model, source)
    tensors = weights.checked_tensors(source, model)
    return jax.tree.map(lambda row: FileRow(row, tensors, model), weights.file_table(model))


def merged_params(place: checkpoint.Place, model: ModelConfig, bits: int = 0) -> PyTree:
    """The weights of a model, an adapter among them merged into its base, each layer read when it is asked for; `bits`
    are those that the base had in training, where that was 8 or 4.

    Raises:
        UserError: as `stored_params`, or the base is not the one that the adapter was trained on.
    """
    whole = weights.base_of(model)
    params = stored_params(place.base or place.source, whole)
    if place.base:
        checkpoint.check_base(place.source, place.base)
        trained, layers = stored_params(place.source, model), dict(params["layers"])
        if bits:
            layers |= {name: AsTrained(layers[name], row, whole, bits) for name, row in MATRICES.items()}
        for name, factors in trained["layers"].items():
            layers[name] = Merged(layers[name], factors, model.lora.scale if model.lora else 0.0)
        words = {name: Words(params[name], trained[name], ids) for name, ids in model.trained_rows}
        params |= {"layers": layers} | words
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
    named = ModelKeys(model_name=config.model_name, base_name=config.base_name)
    place = checkpoint.find_model(named)
    model, _ = checkpoint.model_on(place, named, make_mesh(1, 1, 1, jax.devices()[:1]))
    if config.to == "peft" and not model.lora:
        raise UserError(f"model_name {config.model_name!r} is no low-rank adapter, so there is nothing for --to peft")
    if config.onto == "original" and (not place.base or config.to == "peft"):
        raise UserError("onto = original, but no adapter is merged into a base; leave it out")
    if config.onto == "original" and model.file_bits:
        raise UserError(f"onto = original, but {place.base} holds the quantised weights alone; leave it out")
    kind = KINDS[model.file_dtype] if config.type == "auto" else config.type
    bits = 0 if model.file_bits or config.onto == "original" else model.bits
    model = replace(model, bits=model.file_bits)
    dtype = DTYPES.get(kind, model.file_dtype)
    whole = replace(weights.base_of(model), bits=0, file_bits=0, file_dtype=dtype)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        if config.to == "peft":
            digest, trained = checkpoint.stated_base(place.source)
            facts = {checkpoint.BITS: str(trained)} | ({checkpoint.BASE: digest} if digest else {})
            params = stored_params(place.source, model)
            lines = checkpoint.save_model(output, params, model, place.adapter, facts, place.described)
            done = "adapter in PEFT's layout"
        elif config.to == "hf":
            params = merged_params(place, model, bits)
            lines = checkpoint.save_model(output, params, whole, place.tokenizer, None, place.described)
            done = f"{DTYPES[kind]} in Hugging Face layout"
        else:
            done, lines = to_gguf(config, output, merged_params(place, model, bits), whole, place, kind)
    except OSError as error:
        raise UserError(f"{output} can't be written: {describe_error(error)}") from error
    merged = " merged into its base" if place.base and config.to != "peft" else ""
    merged += f" as it was in training, of {bits} bits" if merged and bits else ""
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
