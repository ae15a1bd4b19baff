"""What chat and serve share: a model ready to generate, and the sampling rules in force."""

import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from lacuna import checkpoint
from lacuna.apps.configs import GenerationConfig
from lacuna.config import SamplingKeys
from lacuna.distributed import enable_compilation_cache, make_mesh
from lacuna.model import PAGE, ModelConfig, head_of, logits_of, prefill
from lacuna.sampler import TOP_LOGPROBS, Sampler, generation_defaults, page_count, slots_for


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
    source, model, tokenizer, _, _ = opened
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


# Log-probabilities of a prompt

Scores = tuple[tuple[float, ...], tuple[Any, ...]]


@partial(jax.jit, static_argnames="model")
def score_tokens(
    params: PyTree[Array], token: Int[Array, "row token"], model: ModelConfig
) -> tuple[Float[Array, " token"], Int[Array, "token top"], Float[Array, "token top"]]:
    """Of each token of the first row but its last: the log-probability (nats) of the next one, and the likeliest tokens
    there with theirs. In batches, as the logits of a whole prompt are large."""
    hidden, _ = prefill(params, token, model)

    def score(part: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        logits = logits_of(part[0][None, None], head_of(params, model), model.vocabulary_size)[0, 0]
        logits -= jax.nn.logsumexp(logits)
        top, top_token = jax.lax.top_k(logits, min(TOP_LOGPROBS, model.vocabulary_size))
        return logits[part[1]], top_token, top

    return jax.lax.map(score, (hidden[0], jnp.roll(token[0], -1)), batch_size=PAGE)


def prompt_scores(sampler: Sampler, prompt: tuple[int, ...], top: int) -> Scores:
    """The log-probability in nats of each token of a prompt given those before it, nan for the first, and the likeliest
    `top` tokens in its place with theirs."""
    token = np.zeros((slots_for(1, sampler.mesh), page_count(len(prompt), sampler.capacity) * PAGE), np.int32)
    token[:, : len(prompt)] = prompt
    with jax.set_mesh(sampler.mesh):
        found = jax.device_get(score_tokens(sampler.params, token, sampler.model))
    values, ids, tops = (part[: len(prompt) - 1].tolist() for part in found)
    likeliest = (tuple(zip(row[:top], value[:top], strict=True)) for row, value in zip(ids, tops, strict=True))
    return (math.nan, *values), ((), *likeliest)
