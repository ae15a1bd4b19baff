"""What chat and serve share: a model ready to generate, and the sampling rules in force."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, PyTree
from pydantic import ValidationError

from lacuna import checkpoint
from lacuna.apps.configs import GenerationConfig, ServeConfig
from lacuna.checkpoint import OpenedModel, opened_params
from lacuna.config import ModelKeys, SamplingKeys, UserError
from lacuna.distributed import enable_compilation_cache, make_mesh
from lacuna.linear import Frozen
from lacuna.model import MATRICES, Lora, shape_of
from lacuna.sampler import Sampler
from lacuna.tokenizer import read_json
from lacuna.weights import read_lora, read_trained_rows


class Generator(NamedTuple):
    """A model ready to generate: its sampler, the directory it came from, and what a request gets unless it says
    otherwise, from what was typed and else from the model's generation_config.json."""

    sampler: Sampler
    source: Path
    rules: SamplingKeys
    stop_ids: tuple[int, ...]


def load_generator(config: GenerationConfig, slots: int) -> Generator:
    """The model of a config with a sampler of that many slots over all devices.

    Raises:
        UserError: whatever about model, devices or memory can't be used.
    """
    mesh = make_mesh(config.data_parallel, config.fsdp, config.tensor)
    model_name = config.model_name or str(checkpoint.newest_run(config.output_dir))
    config = checkpoint.settled(config.model_copy(update={"model_name": model_name}))
    opened = checkpoint.open_model(config, mesh)
    source, model, tokenizer, *_ = opened
    enable_compilation_cache(config)
    capacity = model.capacity(config.capacity)
    named = config.adapters if isinstance(config, ServeConfig) else ()
    bits = config.base_bits
    params, count = (adapters_to_choose(opened, named, bits), len(named) + 1) if named else (opened_params(opened), 0)
    sampler = Sampler(params, opened, slots, capacity, config.compute_dtype, adapter_count=count)
    rules = rules_in_force(config, generation_defaults(tokenizer.directory))
    return Generator(sampler, source, rules, tuple(tokenizer.ends))


def adapters_to_choose(opened: OpenedModel, named: Sequence[str], bits: int) -> PyTree[Array]:
    """A model whose matrices have a choice of adapters: number 0 is none, the others are those named NAME=DIRECTORY;
    `bits` are those that the user wants of the base, 0 if none were named.

    Raises:
        UserError: one is no adapter, or is one of another base.
    """
    if opened.model.lora:
        raise UserError(f"adapters needs model_name to be their base, and {opened.source} is an adapter itself")
    pairs = [adapter_of(opened, name.partition("=")[2], bits) for name in named]
    base: Any = checkpoint.frozen_params(opened._replace(model=replace(opened.model, lora=pairs[0][0])))
    sizes = opened.model.sizes | {"rank": max(lora.rank for lora, _ in pairs)}
    layers = dict(base["layers"])
    for name, row in MATRICES.items():
        none = {key: jnp.zeros(shape_of(factor, sizes)) for key, factor in row.adapter.items()}
        a, b = [none["a"]], [none["b"]]
        for lora, factors in pairs:
            own = factors.get(name, none)
            a.append(none["a"].at[..., : own["a"].shape[-1]].set(own["a"]))
            b.append(none["b"].at[:, : own["b"].shape[1]].set(lora.scale * own["b"]))
        layers[name] = Frozen(layers[name], jnp.stack(a, axis=1), jnp.stack(b, axis=1))
    return base | {"layers": layers}


def adapter_of(opened: OpenedModel, name: str, bits: int) -> tuple[Lora, Mapping[str, dict[str, Array]]]:
    """An adapter of a model, and its factors by matrix."""
    base, source = opened.place.source, checkpoint.resolve_model(name)
    digest, trained = checkpoint.stated_base(source)  # of a known base, which may lie anywhere then
    place = checkpoint.find_model(ModelKeys(model_name=name, base_name=str(base) if digest else ""))
    if not place.base:
        raise UserError(f"adapters has {name}, which is no adapter; serve it by itself, as --model-name {name}")
    if not place.base.samefile(base):
        raise UserError(f"adapters has {name}, whose base is {place.base}, and this server has {base}; serve it apart")
    if rows := read_trained_rows(place.adapter):
        raise UserError(
            f"adapters has {name}, which has rows of its own for {len(rows[0][1])} tokens, and perhaps another "
            f"tokenizer; serve it by itself, as --model-name {name}"
        )
    checkpoint.check_base(place.source, base)
    here = opened.model.bits or 16
    if trained not in (0, here) and not bits:
        raise UserError(
            f"adapters has {name}, which was trained on a base of {trained} bits, and this server's has {here}; add "
            f"--base-bits {trained}, or --base-bits {here} to serve it on that all the same"
        )
    lora = read_lora(place.adapter)
    assert lora, "rows alone were refused"
    one = opened._replace(source=place.source, place=place, model=replace(opened.model, lora=lora))
    return lora, checkpoint.trained_params(one)["layers"]


def rules_by_origin(config: SamplingKeys, defaults: SamplingKeys) -> str:
    """The rules in force in words: those that were typed, those of generation_config.json, and all else."""
    rules = rules_in_force(config, defaults)
    by_origin: dict[str, list[str]] = {"typed": [], "generation_config.json": [], "default": []}
    for name in SamplingKeys.model_fields:
        stated = "generation_config.json" if name in defaults.model_fields_set else "default"
        by_origin["typed" if name in config.model_fields_set else stated].append(f"{name}={getattr(rules, name):g}")
    return "; ".join(f"{' '.join(values)} ({origin})" for origin, values in by_origin.items() if values)


def rules_in_force(config: SamplingKeys, defaults: SamplingKeys) -> SamplingKeys:
    """What the user set in a config, the model's defaults for all else."""
    chosen = {name: getattr(config, name) for name in config.model_fields_set if name in SamplingKeys.model_fields}
    return defaults.model_copy(update=chosen)


def generation_defaults(directory: Path) -> SamplingKeys:
    """The sampling rules that a model asks for in generation_config.json.

    Raises:
        UserError: a value there that no rule can have.
    """
    path = directory / "generation_config.json"
    stated = {name: value for name, value in read_json(path).items() if value is not None}
    values = {name: stated[name] for name in SamplingKeys.model_fields if name in stated and name != "max_tokens"}
    if stated.get("do_sample") is False:
        values["temperature"] = 0.0
    try:
        return SamplingKeys(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(
            f"{path}: {problem['loc'][0]} = {problem['input']!r}: {problem['msg']}; fix the file"
        ) from error
