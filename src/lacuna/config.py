"""The config of each command: its keys with their defaults, bounds and descriptions. Never imports jax."""

import difflib
import importlib.util
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

LINES = "\n\t\u200c\u200d"  # what prints nothing itself, but belongs to texts of many lines and to some scripts
TABLES = ("data", "eval_data")  # the keys that are written as [[tables]], each a DataSource


class UserError(ValueError):
    """An error that the user can fix: the commands print it without a traceback and exit with 2."""


def name_of_model(directory: Path) -> str:
    """What the model in a directory is called: of a checkpoint its run and step, of a run's model the run."""
    run, folder, name = ("", "", *directory.resolve().parts)[-3:]
    if folder == "checkpoints" or name == "best":
        return f"{run if folder == 'checkpoints' else folder}/{name}"
    return folder if name == "model" else name


class Keys(BaseModel):
    """Keys and their checks; the config of a command inherits its sections, the first section being its last base."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def booleans_are_not_numbers(cls, value: Any, info: Any) -> Any:
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation in (int, float):
            raise ValueError("should be a number")
        return value

    @property
    def cache_dir(self) -> Path:
        """The directory of what is reused between runs: encoded documents, compiled programs."""
        return usable_cache(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))


@lru_cache
def usable_cache(chosen: str) -> Path:
    """Our directory in the one that is chosen or, if nothing can be written there, which a warning says, in /tmp.

    Raises:
        UserError: nothing can be written to either.
    """
    wanted, own = Path(chosen) / "lacuna", Path(tempfile.gettempdir()) / f"lacuna-{os.getuid()}"
    problem = unusable(wanted, 0o777) if wanted.parts[0] != "~" else f"{wanted}: this user has no home directory"
    if not problem:
        return wanted
    if own.is_symlink() or unusable(own, 0o700) or own.stat().st_uid != os.getuid():  # programs are loaded from there
        raise UserError(f"{problem}, nor can {own} be used; set XDG_CACHE_HOME to a directory with room")
    print(f"WARNING: {problem}; the cache is {own}, unless XDG_CACHE_HOME names another place", file=sys.stderr)
    return own


def unusable(directory: Path, mode: int) -> str:
    """Why a file of 1 MB can't be written to a directory, which is made if it is not there; empty if it can."""
    try:
        directory.mkdir(mode, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(10**6))
    except OSError as error:
        return f"{directory}: {error.strerror}"
    return ""


def to_toml(config: Keys, without: Iterable[str] = ()) -> str:
    """The config as TOML that reads back as an equal config, except for the keys in `without`."""
    plain, tables = [], []
    for key, value in config.model_dump(exclude=set(without)).items():
        if key in TABLES:
            for entry in value:
                tables += ["", f"[[{key}]]", *(f"{name} = {toml_value(entry[name])}" for name in entry)]
        else:
            plain.append(f"{key} = {toml_value(value)}")
    return "\n".join(plain + tables) + "\n"


def toml_value(value: Any) -> str:
    """The value as TOML, that is JSON but for the delete character; a secret of the environment becomes `${NAME}`."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(toml_value, value))}]"
    for name, secret in os.environ.items() if isinstance(value, str) else ():
        is_place = secret == value or Path(secret).exists()  # no key is a secret itself, nor is a path
        if re.search("KEY|TOKEN|SECRET|PASSWORD", name) and len(secret) >= 8 and not is_place:
            value = value.replace(secret, f"${{{name}}}")
    return json.dumps(value, ensure_ascii=False, default=str).replace("\x7f", "\\u007f")


def printable(text: str, kept: str = "") -> str:
    """A text without what would control the terminal, except for the characters `kept`."""
    return "".join(
        letter if letter.isprintable() or letter in kept else letter.encode("unicode_escape").decode()
        for letter in text
    )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    close = [name for name in known if name.startswith(word)] or difflib.get_close_matches(word, known, 1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


class DataSource(Keys):
    path: str = Field(min_length=1, description="File, glob, or data set on the hub (path:config for one of several)")
    split: str = Field("train", min_length=1, description="Split, or a slice of one such as train[:95%]")
    streaming: bool = Field(False, description="Read while training, for sources larger than memory or patience")
    weight: float = Field(
        1.0, gt=0, description="Passes over this source per epoch or, where a source streams, its share of the tokens"
    )
    messages_column: str = Field("messages", description="Column of chats: lists of role and content")
    tools_column: str = Field("tools", description="Column of the tools that a chat may call")
    prompt_column: str = Field("prompt", description="Column of prompts, each with a completion")
    completion_column: str = Field("completion", description="Column of completions")
    text_column: str = Field("text", description="Column of plain text")
    encode_apart: bool = Field(False, description="Encode prompts written as text, and completions, each by itself")
    prompt_format: Literal["auto", "chat", "text"] = Field(
        "auto",
        description="How prompts with completions are written: by the chat template, or as plain text; auto: by the "
        "template, if there is one and the prompt does not begin with one of its tokens",
    )


class ModelKeys(Keys):
    """Model"""

    model_name: str = Field(
        min_length=1, description="Directory in Hugging Face layout, run or checkpoint of one, or hub id (id@revision)"
    )
    base_name: str = Field(
        "", description="Base of the adapter that model_name is; empty: the one that it names itself"
    )
    base_bits: int = Field(
        0,
        description="Bits of a frozen weight of the layers' matrices: 4 (NF4) or 8, for adapters or without training; "
        "16: as it is stored; 0: the same, or what the adapter was trained on",
    )
    compute_dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="Type that matmuls compute in; auto: float32 where a CPU decodes or lacks bfloat16"
    )
    attention: Literal["auto", "cudnn", "splash", "xla"] = Field(
        "auto", description="Attention kernel; auto: the fastest that the devices support"
    )

    @field_validator("base_bits")
    @classmethod
    def base_bits_are_known(cls, value: int) -> int:
        if value not in (0, 4, 8, 16):
            raise ValueError("should be 4, 8 or 16, or 0 for what is there")
        return value


class DataKeys(Keys):
    """Data"""

    data: tuple[DataSource, ...] = Field(description="What to read")
    sequence_length: int = Field(
        2048, ge=2, description="Tokens per packed row, by default no more than the model allows"
    )
    verify_data: bool = Field(
        False, description="Hash files again whose size and time are as before; of streamed ones none"
    )
    on_bad_data: Literal["error", "skip"] = Field("error", description="Stop at a bad sample, or count and skip it")

    @field_validator("data")
    @classmethod
    def data_is_not_empty(cls, value: tuple[DataSource, ...]) -> tuple[DataSource, ...]:
        if not value:
            raise ValueError("is empty; add a [[data]] table with a path")
        if any(source.streaming for source in value) and not issubclass(cls, RowsConfig):
            raise ValueError("can be streamed by pretrain and sft alone; leave out streaming")
        return value


class TemplateKeys(Keys):
    """Chat template"""

    chat_template: str = Field("", description="Jinja file to use instead of the model's chat template")
    template_date: str = Field("2024-07-26", description="Day that templates see, fixed so that data never changes")
    template_variables: tuple[str, ...] = Field(
        (), description="NAME=VALUE of each variable of the template, VALUE in JSON, as in enable_thinking=false"
    )

    @property
    def template(self) -> tuple[str, str, dict[str, Any]]:
        """How a tokenizer is to render chats: the template's file, the day, and its variables."""
        pairs = (each.partition("=") for each in self.template_variables)
        return self.chat_template, self.template_date, {name.strip(): json.loads(value) for name, _, value in pairs}

    @field_validator("template_variables")
    @classmethod
    def template_variables_are_pairs(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for each in value:
            name, _, text = each.partition("=")
            try:
                json.loads(text)
            except ValueError as error:
                raise ValueError(
                    f"has {each!r}, which is no NAME=VALUE with a value in JSON; write enable_thinking=false, or "
                    f'{name.strip() or "mode"}="text"'
                ) from error
        return value

    @field_validator("template_date", mode="before")
    @classmethod
    def template_date_is_a_day(cls, value: Any) -> str:
        try:
            return date.fromisoformat(str(value)).isoformat()
        except ValueError as error:
            raise ValueError("should be a day such as 2024-07-26") from error


class ChatKeys(TemplateKeys):
    """Chats"""

    packing: bool = Field(True, description="Pack several chats into a row; otherwise one row each")
    train_on: Literal["assistant", "all", "last"] = Field("assistant", description="Messages that the loss counts")


LearningRate = Annotated[
    float,
    Field(
        gt=0,
        description="Highest learning rate, reached after the warm-up; adapters usually take ten times that of all "
        "weights, say 2e-4",
    ),
]
WeightDecay = Annotated[float, Field(ge=0, description="Decay of matrices and embeddings, times the learning rate")]


class OptimizationKeys(Keys):
    """Optimization"""

    from_scratch: bool = Field(False, description="Take only the config and tokenizer from model_name, not the weights")
    micro_batch_size: int = Field(1, ge=1, description="Packed rows per device per forward pass")
    steps: int = Field(0, ge=0, description="Optimizer steps, of grpo rollouts; 0: as many as the epochs give")
    epochs: int = Field(
        1, ge=0, description="Passes over the data when steps is 0; of streamed data after --count has counted one"
    )
    learning_rate: LearningRate = 2e-5
    warmup_steps: int = Field(0, ge=0, description="Steps, as in steps, over which the learning rate rises from 0")
    weight_decay: WeightDecay = 0.1
    clip_norm: float = Field(1.0, gt=0, description="Largest global gradient norm; larger ones are scaled down to it")
    rematerialisation: Literal["none", "matmuls", "layer"] = Field(
        "matmuls", description="What the backward pass recomputes: nothing, all but matmuls and attention, or layers"
    )


LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class AdapterKeys(Keys):
    """Adapters"""

    lora_rank: int = Field(
        0, ge=0, description="Rank of low-rank adapters, which alone train then; 0: all weights train"
    )
    lora_alpha: float = Field(16.0, gt=0, description="What adapters are scaled by, over √rank")
    lora_targets: tuple[str, ...] = Field(LORA_TARGETS, description="Matrices of each layer that have an adapter")
    lora_scaling: Literal["stabilised", "plain"] = Field(
        "stabilised", description="Whether lora_alpha is over √rank (rank-stabilised) or over rank"
    )

    @field_validator("lora_targets")
    @classmethod
    def lora_targets_are_known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in LORA_TARGETS:
                raise ValueError(
                    f"has {name!r}, which is none of {', '.join(LORA_TARGETS)}{did_you_mean(name, LORA_TARGETS)}"
                )
        if not value:
            raise ValueError("is empty; name at least one matrix")
        return tuple(name for name in LORA_TARGETS if name in value)

    @property
    def idle_key(self) -> str:
        """A key that says what adapters are like, although the config asks for none; empty if there is no such key."""
        keys = [key for key, field in AdapterKeys.model_fields.items() if getattr(self, key) != field.default]
        return "" if self.lora_rank or not keys else keys[0]


class DeviceKeys(Keys):
    """Devices"""

    data_parallel: int = Field(1, ge=1, description="Devices along the data axis of the mesh")
    fsdp: int = Field(0, ge=0, description="Devices that the parameters are sharded over; 0: all that remain")
    tensor: int = Field(1, ge=1, description="Devices that each matrix product is sharded over")
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
            raise ValueError("should be a plain folder name; the folder that contains it is output_dir")
        return value

    @property
    def run_directory(self) -> Path:
        return Path(self.output_dir) / self.run_name


class RecordKeys(Keys):
    """Logs, held-out loss and checkpoints"""

    eval_data: tuple[DataSource, ...] = Field((), description="Held-out data")
    log_every: int = Field(1, ge=1, description="Steps between log lines")
    eval_config: str = Field("", description="TOML file of eval, whose tasks run at every evaluation")
    eval_every: int = Field(0, ge=0, description="Steps between evaluations; 0: only at the end")
    patience: int = Field(
        0, ge=0, description="Evaluations in a row without a better held-out loss or reward that end a run; 0: none do"
    )
    save_every: int = Field(0, ge=0, description="Steps between checkpoints; 0: only at the end")
    keep: int = Field(2, ge=1, description="Newest checkpoints to keep, besides the best")
    resume: bool = Field(False, description="Continue the run of this name from its newest checkpoint")
    resume_from: str = Field("", description="Checkpoint directory to continue from instead")
    wandb: Literal["off", "online", "offline"] = Field("off", description="Log to W&B, project WANDB_PROJECT or lacuna")


class ChoiceKeys(Keys):
    """Sampling"""

    temperature: float = Field(1.0, ge=0, description="Divides the logits; 0: always the likeliest token")
    top_k: int = Field(0, ge=0, description="Sample among this many likeliest tokens; 0: all")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample among the likeliest tokens that make up this probability")
    min_p: float = Field(0.0, ge=0, le=1, description="Least probability of a token, as a share of the likeliest one's")


class SamplingKeys(ChoiceKeys):
    """Penalties and length"""

    repetition_penalty: float = Field(1.0, gt=0, description="Divides the logits of tokens seen before; 1: none")
    frequency_penalty: float = Field(0.0, description="Subtracted from a token's logit each time it was generated")
    presence_penalty: float = Field(0.0, description="Subtracted from a token's logit once it was generated")
    max_tokens: int = Field(512, ge=1, description="Most tokens of a completion")


StopTexts = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...], Field(description="Texts that end a completion, which lacks them")
]


def accumulation_steps(batch_size: int, micro_batch_size: int, device_shards: int) -> int:
    """Forward passes per optimizer step; `device_shards` is data_parallel × fsdp, the devices the batch is split over.

    Raises:
        UserError: the batch does not divide; names the nearest sizes that do.
    """
    rows = micro_batch_size * device_shards
    if rest := batch_size % rows:
        nearest = [str(size) for size in (batch_size - rest, batch_size - rest + rows) if size]
        raise UserError(
            f"batch_size = {batch_size} is not a multiple of the {rows} rows of one forward pass (micro_batch_size = "
            f"{micro_batch_size}, data_parallel × fsdp = {device_shards}); set batch_size to {' or '.join(nearest)}"
        )
    return batch_size // rows


class TrainingConfig(RecordKeys, RunKeys, DeviceKeys, AdapterKeys, OptimizationKeys, DataKeys, ModelKeys):
    """The keys that all training commands share."""

    @property
    def has_evaluation(self) -> bool:
        """Whether there is anything to do at an evaluation."""
        return bool(self.eval_config or self.eval_data or getattr(self, "sample_prompts", ()))

    @model_validator(mode="after")
    def keys_agree(self) -> "TrainingConfig":
        if not any(
            getattr(self, key, None) for key in ("run_name", "show", "count", "replay")
        ):  # the last three write no run
            raise ValueError("run_name is required: name the run, as in --run-name first_try")
        if not self.steps and not self.epochs:
            raise ValueError("steps = 0 and epochs = 0 leave nothing to do; set one of them")
        if self.steps and self.warmup_steps > self.steps:
            raise ValueError(
                f"warmup_steps = {self.warmup_steps} is more than steps = {self.steps}; "
                f"set warmup_steps to {self.steps} or less"
            )
        if self.lora_rank and self.from_scratch:
            raise ValueError("lora_rank and from_scratch contradict each other: adapters need a trained base; keep one")
        if len(ways := [key for key in ("resume", "resume_from", "overwrite") if getattr(self, key)]) > 1:
            raise ValueError(f"{' and '.join(ways)} contradict each other; keep one of them")
        if any(source.streaming for source in self.eval_data):
            raise ValueError(
                "eval_data can't be streamed, as each evaluation is of all of it; leave out streaming there"
            )
        if self.patience and not (self.eval_every and self.eval_data):
            raise ValueError(f"patience = {self.patience} has nothing to watch; set eval_every, and add [[eval_data]]")
        if self.eval_every and not self.has_evaluation:
            raise ValueError(
                f"eval_every = {self.eval_every} has nothing to do; add [[eval_data]] or eval_config, or remove it"
            )
        return self


class VocabularyKeys(Keys):
    """New words"""

    new_tokens: str = Field(
        "", description="File of words, one a line, that become tokens; with adapters they train too"
    )
    new_token_init: Literal["mean", "normal"] = Field(
        "mean", description="Rows that new words begin with: around the mean of the old ones, or N(0, 0.02²)"
    )
    train_only: Literal["", "new_tokens"] = Field("", description="What alone trains, as in new_tokens; empty: all")


class RowsConfig(VocabularyKeys, TrainingConfig):
    """Batch and samples"""

    batch_size: int = Field(64, ge=1, description="Packed rows per optimizer step, over all devices")
    count: bool = Field(False, description="Count and keep the rows of an epoch of streamed data, and exit")
    shard_cache: float = Field(20.0, ge=0, description="Gigabytes of the fetched files of streamed data that are kept")
    sample_prompts: tuple[str, ...] = Field((), description="Prompts to answer, or to continue, at every evaluation")
    sample_tokens: int = Field(64, ge=1, description="Most tokens of each such answer")

    @property
    def is_streaming(self) -> bool:
        """Whether any source is read while the run trains."""
        return any(source.streaming for source in self.data)

    @model_validator(mode="after")
    def new_words_can_train(self) -> "RowsConfig":
        if self.train_only and self.lora_rank:
            raise ValueError(
                "train_only and lora_rank contradict each other: with adapters new_tokens train too; leave one out"
            )
        if self.train_only and (not self.new_tokens or self.from_scratch):
            raise ValueError("train_only = new_tokens needs new_tokens = FILE, and weights, so no from_scratch")
        return self

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
    show: int = Field(0, ge=0, description="Print this many packed rows, trained text in colour, and exit")


class ProblemKeys(TemplateKeys):
    """Problems"""

    system_prompt: str = Field("", description="System message before each problem")
    prompt_template: str = Field("{prompt}", description="Text of each problem, with the row's prompt as {prompt}")

    @field_validator("prompt_template")
    @classmethod
    def prompt_template_has_a_placeholder(cls, value: str) -> str:
        if "{prompt}" not in value:
            raise ValueError("has no {prompt}, which the row's prompt replaces")
        return value


class RolloutKeys(ChoiceKeys):
    """Rollouts"""

    prompts_per_step: int = Field(16, ge=1, description="Problems per step")
    completions_per_prompt: int = Field(8, ge=2, description="Completions of each problem, which form its group")
    max_completion_tokens: int = Field(512, ge=1, description="Most tokens of a completion")
    temperature: float = Field(1.0, gt=0, description="Divides the logits, in rollout and update alike")
    stop: StopTexts = ()
    slots: int = Field(64, ge=1, description="Completions that are generated at once")
    constrain: str = Field("", description="File of the only completions to allow, as catalogue.txt; empty: all")
    updates_per_rollout: int = Field(1, ge=1, description="Optimizer steps per rollout, each on its share of groups")
    refill: int = Field(
        1, ge=1, description="Times prompts_per_step that a step may ask to replace groups whose rewards are all alike"
    )

    @property
    def rules(self) -> SamplingKeys:
        """The sampling rules of rollouts."""
        chosen = {key: getattr(self, key) for key in ChoiceKeys.model_fields}
        return SamplingKeys(max_tokens=self.max_completion_tokens, **chosen)


class TurnKeys(Keys):
    """Turns"""

    environment: str = Field(
        "", description="FILE.py:NAME of a class whose methods are tools, or of a function that answers; empty: none"
    )
    max_turns: int = Field(8, ge=1, description="Most turns of the model in a rollout with an environment")
    environment_workers: int = Field(16, ge=1, le=1024, description="Environments that are called at once, in threads")
    environment_seconds: float = Field(60.0, gt=0, description="Longest that one call of one may take, in seconds")


class RewardKeys(Keys):
    """Rewards"""

    reward: tuple[str, ...] = Field(
        ("correct:1.0",),
        description="NAME:WEIGHT of each reward; NAME is correct, format, overlong, rule, rank or FILE.py:FUNCTION",
    )
    reward_workers: int = Field(1, ge=1, le=1024, description="Calls of a reward at once, each in a thread")
    reward_seconds: float = Field(60.0, gt=0, description="Longest that one call of a reward may take, in seconds")
    reward_retries: int = Field(0, ge=0, description="Times that a call of a reward which failed is made again")
    on_reward_error: Literal["stop", "drop"] = Field(
        "stop", description="When a call is given up, save and stop, or do without that reward for that completion"
    )


class ObjectiveKeys(Keys):
    """Objective"""

    scale_by_std: bool = Field(False, description="Divide advantages by the standard deviation of their group")
    loss_normalisation: Literal["token", "sequence", "constant"] = Field(
        "token", description="What counts the same: each token, each completion, or each max_completion_tokens"
    )
    ratio: Literal["token", "sequence", "cispo"] = Field(
        "token",
        description="Ratio of policies: of a token, or of the completion (GSPO), clipped; or a token's as a weight, "
        "bounded by clip_high (CISPO). With one update a rollout all are the same",
    )
    clip_low: float = Field(0.2, ge=0, lt=1, description="How far below 1 the ratio of policies has an effect")
    clip_high: float = Field(0.28, ge=0, description="How far above 1 it has an effect")
    kl_weight: float = Field(0.0, ge=0, description="Weight of the divergence KL(policy ‖ starting policy); 0: none")
    importance_limit: float = Field(2.0, ge=0, description="Largest weight of a token, as trainer/sampler; 0: all 1")
    mask_truncated: bool = Field(True, description="Leave completions cut off at max_completion_tokens out of the loss")


class GrpoConfig(ObjectiveKeys, RewardKeys, TurnKeys, RolloutKeys, ProblemKeys, TrainingConfig):
    """Improve a model by reinforcement learning with verifiable rewards."""

    learning_rate: LearningRate = 1e-6
    weight_decay: WeightDecay = 0.0
    replay: str = Field("", description="Run directory of which one step is computed again from rollouts.jsonl")
    step: int = Field(0, ge=0, description="The step to replay")

    @model_validator(mode="after")
    def rollouts_fit(self) -> "GrpoConfig":
        if self.updates_per_rollout > self.prompts_per_step:
            raise ValueError(
                f"updates_per_rollout = {self.updates_per_rollout} is more than prompts_per_step = "
                f"{self.prompts_per_step}, so an update would have no group; lower updates_per_rollout"
            )
        if self.max_completion_tokens >= self.sequence_length:
            raise ValueError(
                f"sequence_length = {self.sequence_length} has no room for a prompt and max_completion_tokens = "
                f"{self.max_completion_tokens}; raise sequence_length"
            )
        if bool(self.replay) != bool(self.step):
            raise ValueError("replay and step belong together, as in --replay runs/grpo_tiny --step 3")
        if self.environment and self.stop:
            raise ValueError("stop and environment contradict each other: a turn ends where the template ends it")
        if self.constrain and self.environment:
            raise ValueError("constrain and environment contradict each other: a turn is no item; leave one out")
        if not self.reward and not self.environment:  # which may give one itself
            raise ValueError('reward is empty; name at least one, as in reward = ["correct:1.0"]')
        return self


Capacity = Annotated[int, Field(ge=2, description="Most tokens of prompt and answer, unless the model allows fewer")]


OWN_TASKS = ("loss", "generate", "choices")


class EvalConfig(SamplingKeys, RunKeys, DeviceKeys, TurnKeys, ProblemKeys, ChatKeys, DataKeys, ModelKeys):
    """Measure a model: its loss on held-out data, and its results on tasks."""

    tasks: tuple[str, ...] = Field(("loss",), min_length=1, description="loss, generate, choices, or lm-eval tasks")
    task_path: str = Field("", description="Directory of your own tasks of lm-evaluation-harness, as YAML files")
    harness_chat: bool = Field(False, description="Use the chat template in tasks of lm-evaluation-harness")
    samples: int = Field(1, ge=1, description="Completions of each problem")
    stop: StopTexts = ()
    slots: int = Field(64, ge=1, description="Completions that are generated at once")
    capacity: Capacity = 4096
    labels: tuple[str, ...] = Field((), description="Choices for rows without a column choices, as in classification")
    data: tuple[DataSource, ...] = Field((), description="What to read")
    batch_size: int = Field(8, ge=1, description="Rows per device per forward pass")
    temperature: float = Field(0.0, ge=0, description="Divides the logits; 0: always the likeliest token")
    run_name: str = Field("", max_length=200, description="Name of the folder in output_dir; empty: eval_<model>")

    @property
    def harness_tasks(self) -> tuple[str, ...]:
        """The tasks that lm-evaluation-harness runs."""
        return tuple(task for task in self.tasks if task not in OWN_TASKS)

    @field_validator("tasks")
    @classmethod
    def tasks_can_run(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        others = [task for task in value if task not in OWN_TASKS]
        if others and not importlib.util.find_spec("lm_eval"):
            raise ValueError(
                f"names {others[0]}, which is none of {', '.join(OWN_TASKS)}{did_you_mean(others[0], OWN_TASKS)}; for "
                "tasks of lm-evaluation-harness run uv run --extra eval eval"
            )
        return value

    @model_validator(mode="after")
    def tasks_have_what_they_need(self) -> "EvalConfig":
        if own := [task for task in self.tasks if task in OWN_TASKS and not self.data]:
            raise ValueError(f"data is required for {own[0]}; give it as --data.0.path")
        if self.environment and self.stop:
            raise ValueError("stop and environment contradict each other: a turn ends where the template ends it")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"samples = {self.samples} at temperature = 0 are all the same; set temperature, say to 1.0"
            )
        return self

    @property
    def run_directory(self) -> Path:
        path = Path(re.sub("@[0-9a-f]{40}$", "", self.model_name))  # a hub id with the commit that was read
        name = name_of_model(path).replace("/", "_") if path.exists() else path.name
        return Path(self.output_dir) / (self.run_name or f"eval_{name}")
