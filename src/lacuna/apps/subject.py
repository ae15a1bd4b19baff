"""What `check` looks at: a config's own model, cut to its first layers, some rows of its own data, and runs of both."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree
from safetensors.numpy import load_file

from lacuna import checkpoint, cli, objective, optimizer, weights
from lacuna.apps.configs import ConvertConfig
from lacuna.apps.convert import run_convert, stored_params
from lacuna.apps.environments import load_judges
from lacuna.apps.replay import samples_by_step
from lacuna.config import (
    DataSource,
    GrpoConfig,
    RowsConfig,
    SftConfig,
    TrainingConfig,
    UserError,
    to_toml,
)
from lacuna.data import Batch, PackedRows, load_dataset, slots_of
from lacuna.distributed import enable_compilation_cache, make_mesh, put_batch, row_shards
from lacuna.documents import prepare, read_rows, split_range, usable
from lacuna.eval import read_problems
from lacuna.grpo import read_inputs_of_grpo
from lacuna.model import (
    ModelConfig,
    cast,
    embed,
    forward,
    head_of,
    joined,
    logits_of,
    parameter_counts,
    parameter_table,
    read_model_config,
    trained_table,
)
from lacuna.sampler import power_of_two
from lacuna.streaming import ShardedSource, SourcePlace
from lacuna.tokenizer import Tokenizer, read_json
from lacuna.trainer import COMMAND_OF, read_inputs

Value = TypeVar("Value")

LAYERS, ROWS, SHORTEST = 2, 1000, 48
TEXT_CHARACTERS = 160  # of a plain text in the rows that are computed with
LEAST_LENGTH, NEW_TOKENS = 64, 12
SMALL = 2 * 10**7  # parameters, below which a step is so quick that a run needs more of them to be killed in time
UNCLIPPED = 1e30
FACTOR_STD = 0.02  # of the second factors of adapters, which begin at zero
SILENT: dict[str, Any] = {
    "eval_data": (), "eval_config": "", "eval_every": 0, "patience": 0, "sample_prompts": (), "save_every": 0,
    "keep": 9, "resume": False, "resume_from": "", "overwrite": False, "wandb": "off", "log_every": 1000, "show": 0,
    "count": False, "epochs": 1, "on_bad_data": "skip", "data_parallel": 1, "fsdp": 0, "tensor": 1,
}  # fmt: skip
SPREAD = '''
def spread(prompt, completion, row):
    """Differs between completions, so that there is something to learn from whatever the others say."""
    return sum(map(ord, completion)) % 7 / 7
'''


def cut_model(config: TrainingConfig, directory: Path, layers: int) -> dict[str, Any]:
    """Write the model of a config with its first layers alone, as a directory in Hugging Face layout, an adapter as
    another; returns the keys that name them."""
    if getattr(config, "train_only", ""):
        raise UserError("train_only = new_tokens can't be checked yet; leave it out, or set lora_rank in its place")
    place = checkpoint.find_model(config, with_weights=not config.from_scratch)
    raw, model = read_json(place.described / "config.json"), read_model_config(place.described)
    own_head = not config.from_scratch and model.is_tied and weights.has_own_head(place.base or place.described)
    model = replace(model, is_tied=model.is_tied and not own_head)
    kept = min(layers or model.layers, model.layers)
    changes = {key: raw[key][:kept] for key in ("layer_types", "no_rope_layers") if raw.get(key)}
    described, target = directory / "described", directory / "model"
    described.mkdir(parents=True)
    (described / "config.json").write_text(json.dumps(raw | changes | {"num_hidden_layers": kept}))
    cut = replace(model, layers=kept, bits=0, file_bits=0)
    if config.from_scratch:
        checkpoint.copy_description(place.tokenizer, described, target, cut)
        return {"model_name": str(target)}
    params = stored_params(place.base or place.source, model)
    checkpoint.save_model(target, params, cut, place.tokenizer, None, described)
    if not place.base:
        return {"model_name": str(target), "base_bits": config.base_bits or model.file_bits}
    stated: dict[str, Any] = {"lora": weights.read_lora(place.adapter)}
    stated["trained_rows"], adapter = weights.read_trained_rows(place.adapter), directory / "adapter"
    factors = stored_params(place.source, replace(model, **stated))
    checkpoint.save_model(adapter, factors, replace(cut, **stated), place.adapter, None, described)
    bits = config.base_bits or checkpoint.stated_base(place.source)[1] or model.file_bits
    return {"model_name": str(adapter), "base_name": str(target), "base_bits": bits}


class Sampled(NamedTuple):
    """A row that can be used, the length of its text, and the row with plain text cut short."""

    row: dict[str, Any]
    size: int
    short: dict[str, Any]


def sampled_rows(
    source: DataSource, number: int, config: TrainingConfig, tokenizer: Tokenizer, most: int | None, bad: list[str]
) -> list[Sampled]:
    """The first rows of a source that can be used; why others can't is added to `bad`. Raises UserError as a run."""
    if source.streaming and isinstance(config, RowsConfig):
        stream = ShardedSource(source, number, config, tokenizer, "")
        first = takewhile(lambda row: row.place.epoch == 0, stream.rows(SourcePlace()))
        rows: Any = ((str(row.origin), row.value) for row in first if row.value is not None)
    else:
        rows = read_rows(source)
        if "[" in source.split:
            rows = list(rows)
            rows = [rows[at] for at in split_range(source, len(rows))]

    def use(_: str, row: dict[str, Any]) -> Sampled:
        if isinstance(config, GrpoConfig):
            return Sampled(row, len(json.dumps(row, default=str)), row)
        prepared = prepare(row, source, tokenizer, train_on_of(config))
        cut = row if prepared.is_prompted else row | {source.text_column: row[source.text_column][:TEXT_CHARACTERS]}
        return Sampled(row, min(len(prepared.text), TEXT_CHARACTERS) if cut is not row else len(prepared.text), cut)

    return list(islice(usable(rows, use, config.on_bad_data == "skip", bad), most))


def train_on_of(config: TrainingConfig) -> Any:
    """Which messages the loss of a config counts."""
    return config.train_on if isinstance(config, SftConfig) else "all"


def rows_written(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """A file of these rows."""
    path.write_text("".join(json.dumps(row, default=str) + "\n" for row in rows))
    return path


class Subject:
    """A config as `check` runs it: on its own model, cut, on rows of its own data, the shortest of those it looks at,
    and in a directory that is thrown away. What takes long is computed when it is first asked for."""

    def __init__(self, original: TrainingConfig, directory: Path, is_full: bool) -> None:
        """Raises UserError where the config can't be trained with."""
        if original.compute_dtype == "auto" and jax.default_backend() == "cpu":  # bfloat16's rounding hides faults
            original = original.model_copy(update={"compute_dtype": "float32"})
        self.original: Any = checkpoint.settled(original)
        self.directory = directory
        config = self.original
        self.tokenizer = checkpoint.tokenizer_of(checkpoint.find_model(config, with_weights=False), config)
        self.bad, self.computed = list[str](), dict[Any, Any]()
        most = None if is_full else ROWS
        self.sampled = [
            sampled_rows(source, number, config, self.tokenizer, most, self.bad)
            for number, source in enumerate(config.data)
        ]
        if empty := [source.path for source, rows in zip(config.data, self.sampled, strict=True) if not rows]:
            raise UserError(f"{empty[0]}: no row that can be used ({'; '.join(self.bad[:1]) or 'it is empty'})")
        wanted = SILENT | cut_model(config, directory, 0 if is_full else LAYERS) | self.own_keys()
        changes = {key: value for key, value in wanted.items() if key in type(config).model_fields}
        config = config.model_copy(update=changes | {"output_dir": str(directory / "runs"), "run_name": "whole"})
        config = config.model_copy(update={"sequence_length": self.length_of(config)})
        self.mesh = make_mesh(1, 0, 1)
        shards = row_shards(self.mesh)
        rows = 2 * max(shards, 2)
        sizes = {"batch_size": rows, "micro_batch_size": rows // shards} if isinstance(config, RowsConfig) else {}
        self.config: Any = config.model_copy(update=sizes)
        enable_compilation_cache(self.config)

    def own_keys(self) -> dict[str, Any]:
        """The keys of short runs on the shortest of the rows."""
        config, sources = self.original, []
        for number, (source, rows) in enumerate(zip(self.original.data, self.sampled, strict=True)):
            chosen = sorted(rows, key=lambda row: row.size)[:SHORTEST]
            path = rows_written(self.directory / f"short{number}.jsonl", (row.short for row in chosen))
            sources.append(source.model_copy(update={"path": str(path), "split": "train"}))
        count = parameter_counts(replace(read_model_config(self.directory / "described"), layers=LAYERS))["all"]
        keys = {"data": tuple(sources), "steps": 3 if count > SMALL else 8, "warmup_steps": min(config.warmup_steps, 2)}
        if not isinstance(config, GrpoConfig):
            return keys | {"neftune_alpha": 0.0}
        spread = self.directory / "spread.py"
        spread.write_text(SPREAD)
        prompts = min(config.prompts_per_step, 2)
        return keys | {
            "reward": (*config.reward, f"{spread}:spread:0.1"), "max_completion_tokens": NEW_TOKENS, "slots": 16,
            "prompts_per_step": prompts, "completions_per_prompt": min(config.completions_per_prompt, 4),
            "updates_per_rollout": min(config.updates_per_rollout, prompts), "micro_batch_size": 2,
            "mask_truncated": False, "refill": 1,
        }  # fmt: skip

    def length_of(self, config: Any) -> int:
        """Tokens of a row with room for several of the documents, or for any of the problems with its answer."""
        if isinstance(config, GrpoConfig):
            problems = read_problems(config.data, config, self.tokenizer, config.sequence_length, False).problems
            longest = max(len(problem.token) for problem in problems) + 4 * NEW_TOKENS
        else:
            sources = tuple(source.model_copy(update={"streaming": False}) for source in config.data)
            rows = load_dataset(sources, self.tokenizer, config, is_stream=False, is_shuffled=False).rows
            assert isinstance(rows, PackedRows)
            longest = int(1.5 * np.median(slots_of(rows.pieces)))
        return min(max(power_of_two(longest), LEAST_LENGTH), config.sequence_length)

    def once(self, function: Callable[["Subject"], Value]) -> Value:
        """What a function finds of this subject, computed the first time that it is asked for."""
        if function not in self.computed:
            self.computed[function] = function(self)
        return self.computed[function]

    # What is computed with

    @cached_property
    def inputs(self) -> Any:
        """Model and data as a run reads them."""
        if isinstance(self.config, GrpoConfig):
            return read_inputs_of_grpo(self.config, *load_judges(self.config))
        return read_inputs(self.config, not self.config.from_scratch, {})

    @property
    def opened(self) -> checkpoint.OpenedModel:
        """The cut model on all devices."""
        return self.inputs[0]

    @property
    def model(self) -> ModelConfig:
        return self.opened.model

    @cached_property
    def frozen(self) -> PyTree[Array] | None:
        """The weights that do not train, if adapters do."""
        return checkpoint.frozen_params(self.opened)

    @cached_property
    def params(self) -> PyTree[Array]:
        """What trains, as a run begins, but with adapters that have an effect."""
        return self.params_on(self.opened)

    def params_on(self, opened: checkpoint.OpenedModel) -> PyTree[Array]:
        """The same on other devices."""
        with jax.set_mesh(opened.mesh):
            frozen = self.frozen if opened is self.opened else checkpoint.frozen_params(opened)
            params = optimizer.starting_state(self.config, opened, frozen).params

            def begun(row: Any, leaf: Array) -> Array:
                noise = jax.random.normal(jax.random.key(len(row.file_name)), leaf.shape)
                return jax.device_put(FACTOR_STD * noise, leaf.sharding) if row.role == "adapter_b" else leaf

            return jax.tree.map(begun, trained_table(opened.model), params)

    @cached_property
    def whole(self) -> PyTree[Array]:
        """All weights to compute with."""
        return joined(self.frozen, self.params, self.model)

    @cached_property
    def packed(self) -> Any:
        """Rows of a run as [1, row, token] of packed documents: those of its first batch, or of its first rollout."""
        if isinstance(self.config, GrpoConfig):
            most, shards = len(self.kept), 2 * row_shards(self.mesh)
            shape = math.ceil(most / shards) * shards, 1, self.config.sequence_length
            weight_of = objective.token_weights([self.kept], self.config)
            rows, count = objective.packed_rows(self.kept, weight_of, shape, objective.shares_prompts(self.model))
            return jax.tree.map(lambda leaf: leaf[None, : math.ceil(count / shards) * shards, 0], rows)
        data, size = self.inputs[1], self.config.batch_size
        batches = [data.batch(index, size) for index in range(4)]
        fullest = max(batches, key=lambda batch: int(batch.segment.max(axis=1).sum()))
        return jax.tree.map(lambda leaf: leaf[None], fullest)

    @cached_property
    def kept(self) -> list[Any]:
        """The samples of the first rollout that the loss counts."""
        samples = samples_by_step(self.finished.run_directory / "rollouts.jsonl", 1)[1]
        return objective.kept_samples(objective.group_by_prompt(samples), self.config)

    @cached_property
    def documents(self) -> list[Any]:
        """The documents of the packed rows, each in a row of its own."""
        rows = jax.tree.map(lambda leaf: leaf[0], self.packed)
        if isinstance(rows, objective.RolloutBatch):
            weight_of, alone = objective.token_weights([self.kept], self.config), []
            for sample in self.kept:
                row = jax.tree.map(lambda leaf: np.zeros_like(leaf[0]), rows)
                objective.place_part([sample], row, weight_of)
                alone.append(row)
            return alone
        alone = []
        for row in zip(*rows, strict=True):
            for number in range(1, row[3].max() + 1):
                at = row[3] == number
                count = int(at.sum())
                fields = *(leaf[at] for leaf in row[:3]), np.ones(count, np.int32), np.arange(count, dtype=np.int32)
                arrays: Any = (np.pad(field, (0, len(at) - count)) for field in fields)
                alone.append(Batch(*arrays))
        return alone

    def in_micro_batches(self, rows: list[Any]) -> tuple[Any, np.int32]:
        """Rows as micro-batches of as many rows as there are shards, and how many of them hold any."""
        shards = row_shards(self.mesh)
        room = math.ceil(max(len(self.documents), self.packed.token.shape[1]) / shards) * shards
        empty = jax.tree.map(np.zeros_like, rows[0])
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *rows, *[empty] * (room - len(rows)))
        split = jax.tree.map(lambda leaf: leaf.reshape(-1, shards, leaf.shape[-1]), stacked)
        return split, np.int32(math.ceil(len(rows) / shards))

    @property
    def loss(self) -> Any:
        """The loss of a config's step, without what differs between packed and alone by intent."""
        config = self.config
        if isinstance(config, GrpoConfig):
            return objective.policy_loss(config)._replace(ratio="token", kl_weight=0.0, is_repeated=False)
        return optimizer.RowLoss(config.compute_dtype, config.rematerialisation)

    def step(
        self,
        batch: Any,
        count: np.int32 | None = None,
        mesh: Mesh | None = None,
        params: PyTree[Array] | None = None,
        **numbers: float,
    ) -> tuple[optimizer.TrainState, dict[str, float], PyTree[Array]]:
        """One optimizer step from the beginning: the new state, its facts, and the gradient, unclipped."""
        mesh = mesh or self.mesh
        opened = self.opened
        if mesh is not self.mesh:
            opened = checkpoint.open_model(self.config, mesh, with_weights=not self.config.from_scratch)
        with jax.set_mesh(mesh):
            params = self.params_on(opened) if mesh is not self.mesh else jax.tree.map(jnp.copy, params or self.params)
            frozen = checkpoint.frozen_params(opened) if mesh is not self.mesh else self.frozen
            changes = jax.tree.map(jnp.asarray, {"clip_norm": UNCLIPPED, **numbers})
            recipe = optimizer.recipe_of(self.config, self.config.steps)._replace(**changes)
            divisor = None if isinstance(batch, objective.RolloutBatch) else np.float32(self.packed.weight.sum())
            arguments = put_batch(batch, mesh), divisor, jax.device_put(recipe, optimizer.everywhere(mesh))
            static = opened.model, self.loss, count, frozen
            state, facts = optimizer.train_step(optimizer.fresh_state(params), *arguments, *static)
            moments: Any = state.moments
            gradient = jax.tree.map(lambda leaf: leaf / (1 - optimizer.ADAM_BETA1), moments.mu)
        return state, {name: float(value) for name, value in facts.items()}, gradient

    @cached_property
    def first_step(self) -> tuple[optimizer.TrainState, dict[str, float], PyTree[Array]]:
        """The step on the packed rows."""
        return self.step(self.packed)

    def file_tensors(self, params: PyTree[Array]) -> dict[str, np.ndarray]:
        """What trains, or its gradient, by the names and in the axes that its files have."""
        host, found = jax.device_get(params), {}
        for row, leaf in zip(jax.tree.leaves(trained_table(self.model)), jax.tree.leaves(host), strict=True):
            for layer, name in enumerate(weights.file_names(row, self.model)):
                found[name] = weights.file_tensor(leaf, row, layer, self.model, np.float32)
        return found

    def logits(self, batch: Any, params: PyTree[Array] | None = None, model: ModelConfig | None = None) -> np.ndarray:
        """The logits of the trainer's forward pass for rows [row, token]."""
        model = model or self.model
        with jax.set_mesh(self.mesh):
            rows = put_batch(
                jax.tree.map(lambda leaf: leaf[None], (batch.token, batch.segment, batch.position)), self.mesh
            )
            return np.asarray(trainer_logits(params or self.whole, *rows, model, self.config.compute_dtype))

    def log_probabilities(self, params: PyTree[Array]) -> np.ndarray:
        """Of each target of a packed rollout, with these weights that train."""
        with jax.set_mesh(self.mesh):
            compute = joined(
                self.frozen, objective.cast_weights(params, self.model, self.config.compute_dtype), self.model
            )
            batch = put_batch(self.packed, self.mesh)
            return np.asarray(objective.log_probabilities(compute, batch, np.int32(1), self.model, self.loss))

    # Runs

    def run(self, name: str, **changes: Any) -> tuple[TrainingConfig, Any]:
        """A run in this process, all of it, silently: its config, and what it ends with."""
        config = self.config.model_copy(update={"run_name": name, **changes})
        with redirect_stdout(open(os.devnull, "w")):
            return config, cli.run(config)

    @cached_property
    def undisturbed(self) -> tuple[TrainingConfig, optimizer.TrainState]:
        """A run that nothing disturbs, and the state it ends with."""
        config, result = self.run("whole")
        return config, result if isinstance(result, optimizer.TrainState) else result[1]

    @property
    def finished(self) -> Any:
        """The config of that run."""
        return self.undisturbed[0]

    def killed(self, name: str) -> TrainingConfig:
        """The same run in another process, killed once it has saved a step. Raises UserError if it ended before."""
        config = self.config.model_copy(update={"run_name": name, "save_every": 1})
        file = self.directory / f"{name}.toml"
        file.write_text(to_toml(config))
        command = COMMAND_OF[type(config)]
        code = "import sys; from lacuna.cli import main; main()"
        environment = os.environ | {"JAX_PLATFORMS": jax.default_backend()}
        if jax.default_backend() == "cpu":
            environment["JAX_NUM_CPU_DEVICES"] = str(jax.device_count())
        log = self.directory / f"{name}.log"
        with log.open("w") as output:
            child = subprocess.Popen(
                [sys.executable, "-c", code, command, "@", str(file)], stdout=output, stderr=output, env=environment
            )
            try:
                while child.poll() is None and not checkpoint.saved_steps(config.run_directory):
                    time.sleep(0.002)
            finally:
                child.kill()
                child.wait()
        if child.returncode != -signal.SIGKILL:
            raise UserError(f"the run to kill ended by itself: {log.read_text()[-400:]}")
        return config

    @cached_property
    def dense(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The weights as one float32 model in files, an adapter merged by `convert`, read by their names there, and
        its config.json."""
        return self.dense_of(self.params, "dense")

    def dense_of(self, params: PyTree[Array], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """The same of other weights that train."""
        directory, source = self.directory / name, self.finished.run_directory / checkpoint.SOURCE
        if self.model.lora:
            facts = {checkpoint.BITS: str(self.model.bits)}
            adapter = self.directory / f"{name}_adapter"
            checkpoint.save_model(adapter, jax.device_get(params), self.model, source, facts)
            base = self.config.base_name or self.config.model_name
            with redirect_stdout(open(os.devnull, "w")):
                run_convert(ConvertConfig(model_name=str(adapter), base_name=base, type="f32", output=str(directory)))
        else:
            wide = replace(self.model, file_dtype="float32")
            checkpoint.save_model(directory, jax.device_get(params), wide, source)
        tensors = {
            name: value for file in sorted(directory.glob("*.safetensors")) for name, value in load_file(file).items()
        }
        return tensors, json.loads((directory / "config.json").read_text())


@partial(jax.jit, static_argnames=("model", "dtype"))
def trainer_logits(
    params: PyTree[Array], token: Array, segment: Array, position: Array, model: ModelConfig, dtype: str
) -> Array:
    """Logits of rows by the forward pass of training, without padding of the vocabulary."""
    compute = cast(params, parameter_table(model), dtype)
    hidden = forward(compute, embed(compute, token[0], dtype), segment[0], position[0], model)
    return logits_of(hidden, head_of(compute, model).astype(dtype), model.vocabulary_size)[..., : model.vocabulary_size]
