"""The config of each command: its keys with their defaults, bounds and descriptions. Never imports jax."""

import difflib
import importlib.util
import json
import os
import re
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

GPU_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")  # JAX's own, one of which is installed for GPUs
DEVICE_MEMORY_SHARE = 0.92  # that XLA may take; the rest goes to the driver and to communication


class UserError(ValueError):
    """A refusal that the user can mend: the commands print it without a traceback and exit with 2."""


class Keys(BaseModel):
    """Keys and their checks; a command's page inherits its sections, the first of them as its last base."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def booleans_are_not_numbers(cls, value: Any, info: Any) -> Any:
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation in (int, float):
            raise ValueError("should be a number")
        return value

    @property
    def cache_dir(self) -> Path:
        """The directory of what is kept between runs: packing plans, compiled programs."""
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lacuna"


def to_toml(config: Keys, without: Iterable[str] = ()) -> str:
    """The page as TOML that reads back as an equal page, but for the keys left out."""
    plain, tables = [], []
    for key, value in config.model_dump(exclude=set(without)).items():
        if table_of(type(config).model_fields[key]):
            for entry in value:
                tables += ["", f"[[{key}]]", *(f"{name} = {toml_value(entry[name])}" for name in entry)]
        else:
            plain.append(f"{key} = {toml_value(value)}")
    return "\n".join(plain + tables) + "\n"


def toml_value(value: Any) -> str:
    """The value as TOML: JSON, but for the delete character, and `${NAME}` for a secret that the environment holds."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(toml_value, value))}]"
    for name, secret in os.environ.items() if isinstance(value, str) else ():
        if re.search("KEY|TOKEN|SECRET|PASSWORD", name) and len(secret) >= 8:
            value = value.replace(secret, f"${{{name}}}")
    return json.dumps(value, ensure_ascii=False, default=str).replace("\x7f", "\\u007f")


def table_of(field: FieldInfo) -> type[Keys] | None:
    """The page of each entry, where a key takes tables."""
    return next(
        (kind for kind in get_args(field.annotation) if isinstance(kind, type) and issubclass(kind, Keys)), None
    )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    close = [name for name in known if name.startswith(word)] or difflib.get_close_matches(word, known, 1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


class DataSource(Keys):
    path: str = Field(min_length=1, description="File, glob, or data set on the hub (path:config for one of several)")
    split: str = Field("train", min_length=1, description="Split, or a slice of one such as train[:95%]")
    weight: float = Field(1.0, gt=0, description="Passes over this source per epoch")
    messages_column: str = Field("messages", description="Column of chats: lists of role and content")
    tools_column: str = Field("tools", description="Column of the tools that a chat may call")
    prompt_column: str = Field("prompt", description="Column of prompts, each with a completion")
    completion_column: str = Field("completion", description="Column of completions")
    text_column: str = Field("text", description="Column of plain text")


class ModelKeys(Keys):
    """Model"""

    model_name: str = Field(min_length=1, description="Directory in Hugging Face layout, run directory, or hub id")
    compute_dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="Type that matmuls compute in")
    attention: Literal["auto", "cudnn", "splash", "xla"] = Field(
        "auto", description="Kernel of attention; auto: the fastest that the devices have"
    )


class DataKeys(Keys):
    """Data"""

    data: tuple[DataSource, ...] = Field(description="What to read")
    sequence_length: int = Field(2048, ge=2, description="Tokens per packed row")
    on_bad_data: Literal["error", "skip"] = Field("error", description="Stop at a bad sample, or count and skip it")

    @field_validator("data")
    @classmethod
    def data_is_not_empty(cls, value: tuple[DataSource, ...]) -> tuple[DataSource, ...]:
        if not value:
            raise ValueError("is empty; add a [[data]] table with a path")
        return value


def day(value: Any) -> str:
    try:
        return date.fromisoformat(str(value)).isoformat()
    except ValueError as error:
        raise ValueError("should be a day such as 2024-07-26") from error


TemplateDate = Annotated[
    str, BeforeValidator(day), Field(description="Day that templates see, so that data never changes")
]
DAY = "2024-07-26"


class ChatKeys(Keys):
    """Chats"""

    packing: bool = Field(True, description="Pack several chats into a row; otherwise one row each")
    train_on: Literal["assistant", "all", "last"] = Field("assistant", description="Messages that the loss counts")
    chat_template: str = Field("", description="Jinja file in place of the model's chat template")
    template_date: TemplateDate = DAY


LearningRate = Annotated[float, Field(gt=0, description="Highest learning rate, reached after the warm-up")]


class OptimizationKeys(Keys):
    """Optimization"""

    from_scratch: bool = Field(False, description="Take only config and tokenizer from model_name, no weights")
    micro_batch_size: int = Field(1, ge=1, description="Packed rows per device per forward pass")
    steps: int = Field(0, ge=0, description="Optimizer steps; 0: as many as the epochs give")
    epochs: int = Field(1, ge=0, description="Passes over the data when steps is 0")
    learning_rate: LearningRate = 2e-5
    warmup_steps: int = Field(0, ge=0, description="Steps over which the learning rate rises from 0")
    weight_decay: float = Field(0.1, ge=0, description="Decay of matrices and embeddings, times the learning rate")
    clip_norm: float = Field(1.0, gt=0, description="Longest global gradient norm; a longer gradient is scaled to it")
    rematerialisation: Literal["none", "matmuls", "layer"] = Field(
        "matmuls",
        description="What the backward pass computes again: nothing, all but matmuls and attention, or layers",
    )


class DeviceKeys(Keys):
    """Devices"""

    data_parallel: int = Field(1, ge=1, description="Devices along the data axis of the mesh")
    fsdp: int = Field(0, ge=0, description="Devices that share out the parameters; 0: all that are left over")
    tensor: int = Field(1, ge=1, description="Devices that share out each matrix product")
    compilation_cache: bool = Field(True, description="Keep compiled programs between runs")


class RunKeys(Keys):
    """Run"""

    run_name: str = Field("", max_length=200, description="Name of the run's folder in output_dir")
    output_dir: str = Field("runs", min_length=1, description="Folder of all runs")
    overwrite: bool = Field(False, description="Delete an earlier run of this name first")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of everything random: order of data, initial weights, noise")

    @field_validator("run_name")
    @classmethod
    def run_name_is_a_folder_name(cls, value: str) -> str:
        if value and (value == ".." or Path(value).name != value or not value.isprintable()):
            raise ValueError("should be a plain folder name; what stands above it is output_dir")
        return value

    @property
    def run_directory(self) -> Path:
        return Path(self.output_dir) / self.run_name


class RecordKeys(Keys):
    """Logs, held-out loss and checkpoints"""

    eval_data: tuple[DataSource, ...] = Field((), description="Held-out data")
    log_every: int = Field(1, ge=1, description="Steps between log lines")
    eval_config: str = Field("", description="TOML file of eval, whose tasks are measured at every evaluation")
    eval_every: int = Field(0, ge=0, description="Steps between evaluations; 0: only at the end")
    save_every: int = Field(0, ge=0, description="Steps between checkpoints; 0: only at the end")
    keep: int = Field(2, ge=1, description="Newest checkpoints kept, besides the best")
    resume: bool = Field(False, description="Continue the run of this name from its newest checkpoint")
    resume_from: str = Field("", description="Checkpoint directory to continue from instead")
    wandb: Literal["off", "online", "offline"] = Field("off", description="Report to Weights & Biases")
    wandb_project: str = Field("lacuna", min_length=1, description="Project there")


class SamplingKeys(Keys):
    """Sampling"""

    temperature: float = Field(1.0, ge=0, description="Divides the logits; 0: always the likeliest token")
    top_k: int = Field(0, ge=0, description="Sample among that many likeliest tokens; 0: all")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample among the likeliest tokens that make up this probability")
    min_p: float = Field(0.0, ge=0, le=1, description="Least probability of a token, as a share of the likeliest one's")
    repetition_penalty: float = Field(1.0, gt=0, description="Divides the logits of tokens met before; 1: none")
    frequency_penalty: float = Field(0.0, description="Taken from a token's logit each time it was generated")
    presence_penalty: float = Field(0.0, description="Taken from a token's logit once it was generated")
    max_tokens: int = Field(512, ge=1, description="Most tokens of a completion")


def accumulation_steps(batch_size: int, micro_batch_size: int, device_shards: int) -> int:
    """Forward passes per optimizer step; `device_shards` is data_parallel × fsdp, the devices that share out the batch.

    Raises:
        UserError: the batch does not divide; names the nearest that do.
    """
    rows = micro_batch_size * device_shards
    if rest := batch_size % rows:
        nearest = [str(size) for size in (batch_size - rest, batch_size - rest + rows) if size]
        raise UserError(
            f"batch_size = {batch_size} is no multiple of the {rows} rows of one forward pass (micro_batch_size = "
            f"{micro_batch_size}, data_parallel × fsdp = {device_shards}); set batch_size to {' or '.join(nearest)}"
        )
    return batch_size // rows


class TrainingConfig(RecordKeys, RunKeys, DeviceKeys, OptimizationKeys, DataKeys, ModelKeys):
    """What all commands that train have in common."""

    @property
    def has_evaluation(self) -> bool:
        """Whether there is anything to do at an evaluation."""
        return bool(self.eval_config or self.eval_data)

    @property
    def leaves_a_run(self) -> bool:
        """Whether anything is written to the run directory."""
        return True

    @model_validator(mode="after")
    def keys_agree(self) -> "TrainingConfig":
        if self.leaves_a_run and not self.run_name:
            raise ValueError("run_name is required: name the run, as in --run-name first_try")
        if not self.steps and not self.epochs:
            raise ValueError("steps = 0 and epochs = 0 leave nothing to do; set one of them")
        if self.steps and self.warmup_steps > self.steps:
            raise ValueError(
                f"warmup_steps = {self.warmup_steps} is more than steps = {self.steps}; "
                f"set warmup_steps to {self.steps} or less"
            )
        if len(ways := [key for key in ("resume", "resume_from", "overwrite") if getattr(self, key)]) > 1:
            raise ValueError(f"{' and '.join(ways)} contradict each other; keep one of them")
        if self.eval_every and not self.has_evaluation:
            raise ValueError(
                f"eval_every = {self.eval_every} has nothing to do; add [[eval_data]] or eval_config, or drop it"
            )
        return self


class BatchKeys(Keys):
    """Batch and samples"""

    batch_size: int = Field(64, ge=1, description="Packed rows per optimizer step, over all devices")
    sample_prompts: tuple[str, ...] = Field((), description="What to answer, or to continue, at every evaluation")
    sample_tokens: int = Field(64, ge=1, description="Most tokens of each such answer")


class RowsConfig(BatchKeys, TrainingConfig):
    """Training on rows of data, as pretrain and sft do."""

    @property
    def has_evaluation(self) -> bool:
        """Whether there is anything to do at an evaluation."""
        return super().has_evaluation or bool(self.sample_prompts)

    @model_validator(mode="after")
    def batch_divides(self) -> "RowsConfig":
        accumulation_steps(self.batch_size, self.micro_batch_size, self.data_parallel * max(self.fsdp, 1))
        return self


class PretrainConfig(RowsConfig):
    """Train a language model on raw text, from scratch or from given weights."""

    learning_rate: LearningRate = 3e-4


class SftConfig(ChatKeys, RowsConfig):
    """Fine-tune a language model on chats."""

    neftune_alpha: float = Field(0.0, ge=0, description="Noise on embeddings (NEFTune, Jain et al. 2023); 0: none")
    show: int = Field(0, ge=0, description="Print that many packed rows, supervised text in colour, and leave")

    @property
    def leaves_a_run(self) -> bool:
        """Whether anything is written to the run directory."""
        return not self.show


class ProblemKeys(Keys):
    """Problems"""

    system_prompt: str = Field("", description="System message before each problem")
    prompt_template: str = Field("{prompt}", description="What is asked, {prompt} being the row's prompt")
    chat_template: str = Field("", description="Jinja file in place of the model's chat template")
    template_date: TemplateDate = DAY

    @field_validator("prompt_template")
    @classmethod
    def prompt_template_has_its_place(cls, value: str) -> str:
        if "{prompt}" not in value:
            raise ValueError("has no {prompt}, the place of the row's prompt")
        return value


class RolloutKeys(Keys):
    """Rollouts"""

    prompts_per_step: int = Field(16, ge=1, description="Problems per step")
    completions_per_prompt: int = Field(8, ge=2, description="Completions of each, which are its group")
    max_completion_tokens: int = Field(512, ge=1, description="Most tokens of a completion")
    temperature: float = Field(1.0, gt=0, description="Divides the logits, in rollout and in update alike")
    top_k: int = Field(0, ge=0, description="Sample among that many likeliest tokens; 0: all")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample among the likeliest tokens that make up this probability")
    min_p: float = Field(0.0, ge=0, le=1, description="Least probability of a token, as a share of the likeliest one's")
    slots: int = Field(64, ge=1, description="Completions that are generated at once")
    updates_per_rollout: int = Field(1, ge=1, description="Optimizer steps that share out the groups of a rollout")

    @property
    def rules(self) -> SamplingKeys:
        """The rules of sampling for rollouts."""
        shared = {key: getattr(self, key) for key in ("temperature", "top_k", "top_p", "min_p")}
        return SamplingKeys(max_tokens=self.max_completion_tokens, **shared)


class ObjectiveKeys(Keys):
    """Objective"""

    reward: tuple[str, ...] = Field(
        ("correct:1.0",), description="NAME:WEIGHT of each reward, NAME being correct, format or FILE.py:FUNCTION"
    )
    scale_by_std: bool = Field(False, description="Divide advantages by the standard deviation of their group")
    loss_normalisation: Literal["token", "sequence", "constant"] = Field(
        "token", description="Each token, each completion, or each slot of max_completion_tokens counts the same"
    )
    clip_low: float = Field(0.2, ge=0, lt=1, description="How far below 1 the ratio of policies has an effect")
    clip_high: float = Field(0.28, ge=0, description="How far above 1 it has")
    kl_weight: float = Field(0.0, ge=0, description="Weight of the divergence from the starting policy; 0: none")
    importance_limit: float = Field(
        2.0, ge=0, description="Most that a token weighs for sampler and trainer disagreeing; 0: they are not compared"
    )
    mask_truncated: bool = Field(True, description="Leave completions that met max_completion_tokens out of the loss")


class GrpoConfig(ObjectiveKeys, RolloutKeys, ProblemKeys, TrainingConfig):
    """Improve a model by reinforcement with verifiable rewards."""

    learning_rate: LearningRate = 1e-6
    weight_decay: float = Field(0.0, ge=0, description="Decay of matrices and embeddings, times the learning rate")
    replay: str = Field("", description="Run of which one step is computed again from its rollouts.jsonl")
    step: int = Field(0, ge=0, description="That step")

    @property
    def leaves_a_run(self) -> bool:
        """Whether anything is written to the run directory."""
        return not self.replay

    @model_validator(mode="after")
    def rollouts_fit(self) -> "GrpoConfig":
        if self.updates_per_rollout > self.prompts_per_step:
            raise ValueError(
                f"updates_per_rollout = {self.updates_per_rollout} is more than prompts_per_step = "
                f"{self.prompts_per_step}, so an update would have no group; lower it"
            )
        if self.max_completion_tokens >= self.sequence_length:
            raise ValueError(
                f"sequence_length = {self.sequence_length} has no room for a prompt and max_completion_tokens = "
                f"{self.max_completion_tokens}; raise sequence_length"
            )
        if bool(self.replay) != bool(self.step):
            raise ValueError("replay and step belong together, as in --replay runs/grpo_tiny --step 3")
        if not self.reward:
            raise ValueError('reward is empty; name at least one, as in reward = ["correct:1.0"]')
        return self


OWN_TASKS = ("loss", "generate", "choices")


class TaskKeys(Keys):
    """Tasks"""

    tasks: tuple[str, ...] = Field(
        ("loss",), min_length=1, description="loss, generate, choices, or names of EleutherAI's tasks"
    )
    task_path: str = Field("", description="Directory of such tasks of your own, as YAML files")
    harness_chat: bool = Field(False, description="Ask EleutherAI's tasks by the chat template")
    samples: int = Field(1, ge=1, description="Completions of each problem")
    stop: tuple[str, ...] = Field((), description="Texts that end a completion")
    slots: int = Field(64, ge=1, description="Completions that are generated at once")
    capacity: int = Field(4096, ge=2, description="Most tokens of prompt and answer together, where the model has more")
    choices_column: str = Field("choices", description="Column of what to choose from")
    labels: tuple[str, ...] = Field((), description="What to choose from where rows do not say, as in classification")

    @property
    def harness_tasks(self) -> tuple[str, ...]:
        """The tasks that lm-evaluation-harness knows how to run."""
        return tuple(task for task in self.tasks if task not in OWN_TASKS)

    @field_validator("tasks")
    @classmethod
    def tasks_can_run(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        others = [task for task in value if task not in OWN_TASKS]
        if others and not importlib.util.find_spec("lm_eval"):
            raise ValueError(
                f"names {others[0]}, which is none of {', '.join(OWN_TASKS)}{did_you_mean(others[0], OWN_TASKS)}; for "
                "tasks of lm-evaluation-harness start it as uv run --extra eval eval"
            )
        return value


class EvalConfig(TaskKeys, SamplingKeys, RunKeys, DeviceKeys, ProblemKeys, ChatKeys, DataKeys, ModelKeys):
    """Measure a model: its loss on held-out data, and how it does at tasks."""

    data: tuple[DataSource, ...] = Field((), description="What to read")
    batch_size: int = Field(8, ge=1, description="Rows per device per forward pass")
    temperature: float = Field(0.0, ge=0, description="Divides the logits; 0: always the likeliest token")
    run_name: str = Field("", max_length=200, description="Name of the folder in output_dir; empty: eval_<model>")

    @model_validator(mode="after")
    def tasks_have_what_they_need(self) -> "EvalConfig":
        if own := [task for task in self.tasks if task in OWN_TASKS and not self.data]:
            raise ValueError(f"data is required for {own[0]}; give it as --data.0.path")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples = {self.samples} at temperature = 0 are all alike; set temperature, say to 1.0")
        return self

    @property
    def run_directory(self) -> Path:
        return Path(self.output_dir) / (self.run_name or f"eval_{Path(self.model_name).resolve().name}")
