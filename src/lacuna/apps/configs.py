"""The configs of the commands in this folder. Never imports jax, so that an error is reported at once."""

import re
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, SecretStr, field_validator, model_validator

from lacuna.config import (
    Capacity,
    DeviceKeys,
    GrpoConfig,
    Keys,
    ModelKeys,
    PretrainConfig,
    RunKeys,
    SamplingKeys,
    SftConfig,
    TemplateKeys,
    name_of_model,
)

ORIGIN = r"\*|[a-z][a-z0-9+.-]*://[^/\s]+"


def checked_address(pattern: str, kind: str, value: str) -> str:
    if not re.fullmatch(pattern, value):
        scheme, _, rest = value.rpartition("://")
        known = scheme if re.fullmatch(pattern, f"{scheme}://host") else "http"
        raise ValueError(f"is not {kind}; write {known}://{rest if kind == 'a URL' else rest.partition('/')[0]}")
    return value


class PlanKeys(Keys):
    """Plan"""

    topology: str = Field(min_length=1, description="Accelerators to plan for, as in h200:8, a100:1, v5e:16, v5p:4x4x4")
    plan_file: str = Field("plan.json", min_length=1, description="JSON file to write the figures to")
    search: bool = Field(True, description="Find the largest micro-batch that fits, or what would make one fit")


class PretrainPlan(PlanKeys, PretrainConfig):
    """Memory, time and communication of pretrain on accelerators that are not here."""


class SftPlan(PlanKeys, SftConfig):
    """Memory, time and communication of sft on accelerators that are not here."""


class GrpoPlan(PlanKeys, GrpoConfig):
    """Memory, time and communication of grpo on accelerators that are not here."""


class CheckKeys(Keys):
    """Check"""

    full: bool = Field(False, description="All layers and all rows, instead of two layers and the first 1,000 rows")
    only: tuple[str, ...] = Field(
        (), description="Promises to check, by their names; empty: all that concern the config"
    )
    check_file: str = Field("check.json", min_length=1, description="JSON file to write the lines to")


class PretrainCheck(CheckKeys, PretrainConfig):
    """Prove what pretrain promises on your own model, data and config."""


class SftCheck(CheckKeys, SftConfig):
    """Prove what sft promises on your own model, data and config."""


class GrpoCheck(CheckKeys, GrpoConfig):
    """Prove what grpo promises on your own model, data and config."""


class ConvertConfig(Keys):
    """Write a model for other runtimes, an adapter merged into its base: a directory, or a GGUF file."""

    model_name: str = Field(
        min_length=1, description="Run or checkpoint of one, directory in Hugging Face layout, or hub id (id@revision)"
    )
    base_name: str = Field(
        "", description="Base of the adapter that model_name is; empty: the one that it names itself"
    )
    to: Literal["hf", "gguf", "peft"] = Field(
        "hf",
        description="Hugging Face layout, the format of llama.cpp and Ollama, or that of peft for an adapter",
    )
    type: Literal["auto", "f32", "f16", "bf16", "q8_0", "q4_0"] = Field(
        "auto", description="Type of matrices and embedding; auto: as in the model's config.json"
    )
    onto: Literal["trained", "original"] = Field(
        "trained", description="Base that an adapter is merged into: as training had it, in 8 or 4 bits, or as it is"
    )
    output: str = Field(min_length=1, description="Directory, or file for gguf, to write, not there yet")
    name: str = Field("", description="Name in a GGUF file; empty: that of the run, directory or hub id")
    license: str = Field("", description="Licence in a GGUF file, as apache-2.0; empty: that of the model's README.md")

    @model_validator(mode="after")
    def keys_fit_the_format(self) -> "ConvertConfig":
        if self.to == "hf" and self.type in ("q8_0", "q4_0"):
            raise ValueError(f"type = {self.type} is only for GGUF; add --to gguf, or take f32, f16 or bf16")
        if self.to == "peft" and self.type != "auto":
            raise ValueError(f"type = {self.type}, but adapters are written in float32; leave it out")
        if self.to != "gguf" and (given := {"name", "license"} & self.model_fields_set):
            raise ValueError(f"{', '.join(sorted(given))} is only for GGUF; add --to gguf, or leave it out")
        return self


class MergeConfig(ModelKeys):
    """Fold an adapter into the weights under it, and write the model in Hugging Face layout."""

    model_name: str = Field(min_length=1, description="Run, checkpoint, directory or hub id of an adapter")
    output: str = Field(min_length=1, description="Directory to write the model to, not there yet")
    onto: Literal["trained", "original"] = Field(
        "trained", description="With base_bits: the dequantised weights that it was trained on, or the original ones"
    )
    dtype: Literal["", "float32", "bfloat16", "float16"] = Field(
        "", description="Type of the weights that are written; empty: that of the base, which rounds the sum to it"
    )


class GenerationConfig(SamplingKeys, TemplateKeys, DeviceKeys, ModelKeys):
    """Generation"""

    model_name: str = Field(
        "", description="Run or checkpoint of one, directory in Hugging Face layout, or hub id; empty: the newest run"
    )
    output_dir: str = Field("runs", min_length=1, description="Folder of all runs")
    capacity: Capacity = 4096


class ChatConfig(GenerationConfig):
    """Talk in the terminal to a model on this machine or on a server."""

    seed: int = Field(0, ge=0, lt=2**32, description="Seed of every answer: the same turns get the same answers")
    system: str = Field("", description="System message of a new conversation")
    instruct: bool = Field(
        True, description="Use the chat template, or continue plain text; if not given: use a template if there is one"
    )
    endpoint: Annotated[str, AfterValidator(partial(checked_address, "(https?://.+)?", "a URL"))] = Field(
        "", description="URL of an OpenAI-style server to talk to"
    )
    api_key: SecretStr = Field(
        SecretStr(""), description="Key for the endpoint; empty: the value of OPENAI_API_KEY, if set"
    )

    @model_validator(mode="after")
    def keys_agree(self) -> "ChatConfig":
        machine = (*TemplateKeys.model_fields, *DeviceKeys.model_fields)
        here = ("output_dir", "capacity", "compute_dtype", "attention", *machine)
        if self.endpoint and (given := [key for key in here if key in self.model_fields_set]):
            raise ValueError(f"{', '.join(given)} can't be chosen for a server; leave it out, or leave endpoint out")
        if self.api_key.get_secret_value() and not self.endpoint:
            raise ValueError("api_key is for a server; add its URL as --endpoint URL, or leave api_key out")
        if self.system and not self.instruct:
            raise ValueError("system needs a chat template, which instruct = false turns off; leave one of them out")
        return self


def is_loopback(host: str) -> bool:
    """Whether a host name or address reaches only this machine."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


class ServeConfig(GenerationConfig):
    """Serve a model over HTTP as OpenAI does, with a page to chat with."""

    host: str = Field(
        "127.0.0.1", min_length=1, description="Address to listen on; any but this machine's own needs api_key"
    )
    port: int = Field(8000, ge=0, lt=2**16, description="Port to listen on; 0: any free one, which is printed")
    api_key: SecretStr = Field(SecretStr(""), description="Key that requests need, as in ${SERVE_KEY}; empty: none")
    allow_origin: tuple[Annotated[str, AfterValidator(partial(checked_address, ORIGIN, "an origin"))], ...] = Field(
        (), description="Origins of web pages that may use this server, as in http://localhost:5173; *: all of them"
    )
    served_name: str = Field("", description="The model's name in requests; empty: the last part of model_name")
    adapters: tuple[str, ...] = Field(
        (), description="NAME=DIRECTORY of adapters of this model, each a model in requests by its name"
    )
    slots: int = Field(16, ge=1, description="Completions generated at once")
    queue_size: int = Field(64, ge=0, description="Completions that may wait for a slot; more are rejected")
    drain_seconds: int = Field(60, ge=0, description="Time for running completions to end after SIGTERM or Ctrl-C")

    @field_validator("adapters")
    @classmethod
    def adapters_have_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        names = [each.partition("=")[0] for each in value]
        for each, name in zip(value, names, strict=True):
            if not re.fullmatch(r"[^=\s]+=.+", each) or names.count(name) > 1:
                raise ValueError(
                    f"has {each!r}, which should be NAME=DIRECTORY with a name of its own, as sql=runs/sql"
                )
        return value

    @model_validator(mode="after")
    def other_machines_need_a_key(self) -> "ServeConfig":
        if not is_loopback(self.host) and not self.api_key.get_secret_value():
            raise ValueError(f"host = {self.host} opens this server to others; set api_key, or leave host out")
        if "*" in self.allow_origin and not self.api_key.get_secret_value():
            raise ValueError("allow_origin = * opens this server to every web page; set api_key, or name the origins")
        return self

    @field_validator("api_key")
    @classmethod
    def api_key_fits_a_header(cls, value: SecretStr) -> SecretStr:
        if not re.fullmatch(r"[!-~]*", value.get_secret_value()):
            raise ValueError("should be ASCII without spaces, as it is sent in a header")
        return value


class RecommendConfig(RunKeys, DeviceKeys, ModelKeys):
    """Measure a recommender: HR@K and NDCG@K of its beams over a catalogue, beside a rule of counting."""

    prepared: str = Field(min_length=1, description="Directory that recommend prepare wrote")
    split: Literal["valid", "test"] = Field("test", description="Rows to measure on")
    task: Literal["sid_next_item", "sid_sequence", "title_history_to_sid"] = Field(
        "sid_next_item", description="What is asked: the next item after semantic ids, the same bare, or after titles"
    )
    beams: int = Field(50, ge=1, description="Items to recommend, and hypotheses of the search for them")
    exact: bool = Field(False, description="Score every item of the catalogue instead of searching")
    capacity: Capacity = 512
    batch_size: int = Field(16, ge=1, description="Prompts per device that are searched at once")
    limit: int = Field(0, ge=0, description="Rows to measure on, the first ones; 0: all")
    run_name: str = Field("", max_length=200, description="Name of the folder in output_dir; empty: recommend_<model>")

    @property
    def run_directory(self) -> Path:
        path = Path(self.model_name)
        name = name_of_model(path).replace("/", "_") if path.exists() else path.name
        return Path(self.output_dir) / (self.run_name or f"recommend_{name}")


class PrepareConfig(Keys):
    """Make what a recommender learns from: semantic ids, a catalogue, prompts and completions."""

    data: str = Field(min_length=1, description="Directory in MiniOneRec's layout, or CSV of user,item,time[,title]")
    out: str = Field(min_length=1, description="Directory to write")
    category: str = Field("", description="Category of the directory's files, and what prompts call the items")
    train: str = Field("train", min_length=1, description="Folder of the directory with the rows to train on")
    items: str = Field("", description="CSV of item[,title], a line for each row of vectors, for a CSV of interactions")
    vectors: str = Field("", description="numpy file of a vector for each line of items; empty: made from the titles")
    codebook: int = Field(256, ge=2, description="Most words at each of three levels of semantic ids made here")
    split: Literal["leave_one_out", "time"] = Field(
        "leave_one_out", description="What of a CSV is held out: each user's last two items, or the last fifth of time"
    )
    history: int = Field(10, ge=1, description="Most items before the one to predict, for a CSV of interactions")
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of clustering, and of how titles are asked for")
    on_bad_data: Literal["error", "skip"] = Field("error", description="Stop at a bad row, or count and skip it")
    overwrite: bool = Field(False, description="Replace what an earlier start wrote")

    @model_validator(mode="after")
    def a_directory_has_a_category(self) -> "PrepareConfig":
        if Path(self.data).is_dir():
            if not self.category:
                raise ValueError(f"category is required for the directory {self.data}, as Industrial_and_Scientific")
            if given := [
                key for key in ("items", "vectors", "codebook", "history", "split") if key in self.model_fields_set
            ]:
                raise ValueError(f"{', '.join(given)} can't be chosen for a directory, which has its own; leave it out")
        elif not Path(self.data).is_file():
            raise ValueError(f"data = {self.data}: no such directory or file; paths start from {Path.cwd()}")
        return self
