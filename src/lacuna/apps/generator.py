"""What chat and serve share: a model ready to generate, and the sampling rules in force."""

from pathlib import Path
from typing import NamedTuple

from lacuna import checkpoint
from lacuna.apps.configs import GenerationConfig
from lacuna.config import SamplingKeys
from lacuna.distributed import enable_compilation_cache, make_mesh
from lacuna.sampler import Sampler, generation_defaults


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
    params = checkpoint.opened_params(opened)
    sampler = Sampler(params, opened, slots, capacity, config.compute_dtype)
    rules = rules_in_force(config, generation_defaults(tokenizer.directory))
    return Generator(sampler, source, rules, tuple(tokenizer.ends))


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
