"""The model: a table of parameters from which everything about a weight derives, the forward pass, and the loss.

Qwen2/2.5, Qwen3, Llama 2/3, Mistral, SmolLM2, SmolLM3 and OLMo-2 differ in a few rows and numbers, so a family is a
`ModelConfig` read from config.json, not a class.
"""

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Shaped

from lacuna.attention import RESIDUAL, attention, pad_tokens
from lacuna.config import UserError
from lacuna.distributed import AXIS_RULES, ROW_AXES, platform, row_shards, shard, shard_rows
from lacuna.linear import PRODUCT, Frozen, Words, gradient_of_scores, linear, product_over_tokens, scores
from lacuna.quantised import stored_bits
from lacuna.tokenizer import read_json, read_keys

PAGE = 64  # tokens of the cache
NEW_ROWS_STD = 0.02  # of new words without regard to the old ones, as MiniOneRec's port to JAX begins them

Tokens = Int[Array, "batch token"]
PerToken = Float[Array, "batch token"]
Hidden = Float[Array, "batch token embed"]
TrainedRows = tuple[tuple[str, tuple[int, ...]], ...]  # the name of each table, and tokens
Head = Float[Array, "vocab embed"] | Words
PerSlot = Int[Array, " slot"]
Logits = Float[Array, "batch token vocab"]
Rotation = tuple[Float[Array, "batch token half"], Float[Array, "batch token half"]]  # cosine and sine
# Of each layer, keys [slot, kv_head, page, head, offset] and values [slot, kv_head, page, offset, head]
Cache = tuple[tuple[Array, Array], ...]


@dataclass(frozen=True)
class Lora:
    """What shapes low-rank adapters (Hu et al. 2021): their rank, what their output is scaled by, and the matrices of a
    layer that have one, by their names in transformers.

    The scale is alpha / √rank if it is rank-stabilised (Kalajdzievski 2023), else alpha / rank.
    """

    rank: int
    alpha: float
    is_stabilised: bool
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """What the product of the two factors is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.is_stabilised else self.rank)


@dataclass(frozen=True)
class ModelConfig:
    """The numbers of config.json that shape the computation; hashable, so a static argument of `jit`.

    `rope_scaling` stretches the rotary wavelengths beyond the original context, and is empty without. By rope type
    llama3 (Dubey et al. 2024) it is the factor, the turns within the original context up to which it applies in full
    and from which not at all, and that context in tokens; by yarn (Peng et al. 2023) the factor, the pairs of channels
    up to which it does not apply and from which in full, and what multiplies cosine and sine.
    `unrotated_layers` are those without rotary embedding (Yang et al. 2025). With `lora` only adapters train, and all
    that config.json describes is their frozen base. The layers' matrices are of `bits`, 8 or 4 where they are quantised
    and all is frozen, else 0, and of `file_bits` in the files; `scale_bits` are those of a scale. Of embedding
    and head `trained_rows` has the tokens whose rows train where all else is frozen, but for an adapter.
    """

    family: str
    vocabulary_size: int
    embed: int
    layers: int
    kv_heads: int
    group: int
    head: int
    feedforward: int
    max_positions: int
    sliding_window: int
    norm_epsilon: float
    rope_theta: float
    rope_type: str
    rope_scaling: tuple[float, ...]
    unrotated_layers: tuple[int, ...]
    is_tied: bool
    has_bias: bool
    attention_dropout: float
    initializer_range: float
    file_dtype: str
    padded_vocabulary: int
    attention: str
    lora: Lora | None = None
    trained_rows: TrainedRows = ()
    bits: int = 0
    file_bits: int = 0
    scale_bits: int = 8

    @property
    def is_frozen(self) -> bool:
        """Whether the weights that config.json describes stay as they are."""
        return bool(self.is_adapter or self.bits)

    @property
    def is_adapter(self) -> bool:
        """Whether what trains is no model by itself: low-rank factors, or rows of the vocabulary."""
        return bool(self.lora or self.trained_rows)

    @property
    def held(self) -> str:
        """What is not as config.json has it, in words that go on; nothing if all is."""
        adapter = f", with an adapter of rank {self.lora.rank}" if self.lora else ""
        rows = f", with own rows of {len(self.trained_rows[0][1]):,} tokens" if self.trained_rows else ""
        return f", its matrices in {self.bits} bits" * bool(self.bits) + adapter + rows

    @property
    def sizes(self) -> dict[str, int]:
        """Length of every logical axis."""
        return {
            "layer": self.layers, "vocab": self.padded_vocabulary, "embed": self.embed, "kv_head": self.kv_heads,
            "group": self.group, "head": self.head, "feedforward": self.feedforward,
            "rank": self.lora.rank if self.lora else 0,
            **{f"{name}_row": len(ids) for name, ids in self.trained_rows},
        }  # fmt: skip

    def capacity(self, wanted: int) -> int:
        """The longest sequence the model takes, up to `wanted`: its positions and any sliding window limit it."""
        return min(wanted, self.max_positions, self.sliding_window or wanted)


@dataclass(frozen=True)
class Parameter:
    """One row of the table: logical axes, role, name and axes in the Hugging Face file (`*` joins merged axes); one of
    the layers' has a tensor there for each, and `file_name` is what follows the layer's own name."""

    axes: str
    role: Literal["matmul", "residual", "embedding", "norm", "bias", "adapter_a", "adapter_b"]
    file_name: str
    file_axes: str

    @property
    def decays(self) -> bool:
        """Matrices and embeddings take weight decay; norm scales and biases, stacked or not, do not."""
        return self.role not in ("norm", "bias")

    @property
    def module(self) -> str:
        """The name in transformers of what it belongs to."""
        return self.file_name.split(".")[-2]

    @property
    def adapter(self) -> dict[str, "Parameter"]:
        """The rows of a matrix's adapter, which adds x · a · b to its product with x."""
        (outputs, inputs), stem = self.file_axes.split(), self.file_name.removesuffix("weight")
        apart = {merged: merged.replace("*", " ") for merged in (outputs, inputs)}
        return {
            "a": Parameter(f"layer {apart[inputs]} rank", "adapter_a", f"{stem}lora_A.weight", f"rank {inputs}"),
            "b": Parameter(f"layer rank {apart[outputs]}", "adapter_b", f"{stem}lora_B.weight", f"{outputs} rank"),
        }

    def rows(self, axes: str) -> "Parameter":
        """The row of those rows of an embedding or a head that train apart."""
        stem = self.file_name.removesuffix("weight")
        return replace(self, axes=axes, file_axes=axes, file_name=f"{stem}token_adapter.trainable_tokens_delta")

    @property
    def has_layers(self) -> bool:
        """Whether the row is of the layers, stacked."""
        return self.axes.startswith("layer ")


EMBEDDING = Parameter("vocab embed", "embedding", "model.embed_tokens.weight", "vocab embed")
FINAL_NORM = Parameter("embed", "norm", "model.norm.weight", "embed")
HEAD = Parameter("vocab embed", "matmul", "lm_head.weight", "vocab embed")
MATRICES = {
    "query": Parameter(
        "layer embed kv_head group head", "matmul", "self_attn.q_proj.weight", "kv_head*group*head embed"
    ),
    "key": Parameter("layer embed kv_head head", "matmul", "self_attn.k_proj.weight", "kv_head*head embed"),
    "value": Parameter("layer embed kv_head head", "matmul", "self_attn.v_proj.weight", "kv_head*head embed"),
    "output": Parameter(
        "layer kv_head group head embed", "residual", "self_attn.o_proj.weight", "embed kv_head*group*head"
    ),
    "gate": Parameter("layer embed feedforward", "matmul", "mlp.gate_proj.weight", "feedforward embed"),
    "up": Parameter("layer embed feedforward", "matmul", "mlp.up_proj.weight", "feedforward embed"),
    "down": Parameter("layer feedforward embed", "residual", "mlp.down_proj.weight", "embed feedforward"),
}
MODULES = {row.module: name for name, row in MATRICES.items()}
VOCABULARY = {"embedding": EMBEDDING, "head": HEAD}
INPUT_NORMS = {
    "attention_norm": Parameter("layer embed", "norm", "input_layernorm.weight", "embed"),
    "feedforward_norm": Parameter("layer embed", "norm", "post_attention_layernorm.weight", "embed"),
}
OUTPUT_NORMS = {
    "attention_output_norm": Parameter("layer embed", "norm", "post_attention_layernorm.weight", "embed"),
    "feedforward_output_norm": Parameter("layer embed", "norm", "post_feedforward_layernorm.weight", "embed"),
}
QKV_BIAS = {
    "query_bias": Parameter("layer kv_head group head", "bias", "self_attn.q_proj.bias", "kv_head*group*head"),
    "key_bias": Parameter("layer kv_head head", "bias", "self_attn.k_proj.bias", "kv_head*head"),
    "value_bias": Parameter("layer kv_head head", "bias", "self_attn.v_proj.bias", "kv_head*head"),
}
BIASES = QKV_BIAS | {"output_bias": Parameter("layer embed", "bias", "self_attn.o_proj.bias", "embed")}
EACH_HEAD_NORM = {
    "query_norm": Parameter("layer head", "norm", "self_attn.q_norm.weight", "head"),
    "key_norm": Parameter("layer head", "norm", "self_attn.k_norm.weight", "head"),
}
ALL_HEADS_NORM = {
    "query_norm": Parameter("layer kv_head group head", "norm", "self_attn.q_norm.weight", "kv_head*group*head"),
    "key_norm": Parameter("layer kv_head head", "norm", "self_attn.k_norm.weight", "kv_head*head"),
}


class Family(NamedTuple):
    """A model_type: its class in transformers, its rows besides the matrices, those that attention_bias adds, and what
    it takes where config.json lacks a key."""

    architecture: str
    rows: dict[str, Parameter]
    biases: dict[str, Parameter]
    defaults: dict[str, Any]


FAMILIES = {
    "llama": Family("LlamaForCausalLM", INPUT_NORMS, BIASES, {}),
    "mistral": Family("MistralForCausalLM", INPUT_NORMS, {}, {"sliding_window": 4096}),
    "qwen2": Family("Qwen2ForCausalLM", INPUT_NORMS | QKV_BIAS, QKV_BIAS, {"max_window_layers": 28}),
    "qwen3": Family("Qwen3ForCausalLM", INPUT_NORMS | EACH_HEAD_NORM, BIASES, {"max_window_layers": 28}),
    "smollm3": Family("SmolLM3ForCausalLM", INPUT_NORMS, BIASES, {"tie_word_embeddings": True, "rope_theta": 2e6}),
    "olmo2": Family("Olmo2ForCausalLM", OUTPUT_NORMS | ALL_HEADS_NORM, BIASES, {}),
}


def parameter_table(model: ModelConfig) -> PyTree[Parameter]:
    """Every weight of the model, in the shape of the parameter tree."""
    family = FAMILIES[model.family]
    layers = MATRICES | family.rows | (family.biases if model.has_bias else {})
    table = {"embedding": EMBEDDING, "layers": layers, "final_norm": FINAL_NORM}
    return table if model.is_tied else table | {"head": HEAD}


def trained_table(model: ModelConfig) -> PyTree[Parameter]:
    """What training changes: every weight, or only the adapters, if any, and rows of the vocabulary."""
    if not model.is_frozen:
        return parameter_table(model)
    targets = model.lora.targets if model.lora else ()
    rows = {name: VOCABULARY[name].rows(f"{name}_row embed") for name, _ in model.trained_rows}
    return {"layers": {MODULES[module]: MATRICES[MODULES[module]].adapter for module in targets}} | rows


def shape_of(row: Parameter, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Shape of a weight in memory."""
    return tuple(sizes[axis] for axis in row.axes.split())


def is_quantised(row: Parameter, model: ModelConfig) -> bool:
    """Whether a weight is held in 8 or 4 bits."""
    return bool(model.bits) and row.has_layers and row.role in ("matmul", "residual")


def partition_spec(row: Parameter) -> PartitionSpec:
    """Mesh axis of each of a weight's dimensions."""
    return PartitionSpec(*(AXIS_RULES.get(axis) for axis in row.axes.split()))


def parameter_counts(model: ModelConfig) -> dict[str, int]:
    """Parameters of the model, of what trains and of that with weight decay; those in matrix products, where a tied
    head counts, and those among them that train."""
    sizes = model.sizes | {"vocab": model.vocabulary_size}
    whole, trained = jax.tree.leaves(parameter_table(model)), jax.tree.leaves(trained_table(model))
    count = {row: math.prod(shape_of(row, sizes)) for row in (*whole, *trained)}
    idle = ("norm", "bias") if model.is_tied else ("norm", "bias", "embedding")
    adapters = sum(count[row] for row in trained if row.role.startswith("adapter"))
    return {
        "all": sum(count[row] for row in whole),
        "trained": sum(count[row] for row in trained),
        "decayed": sum(count[row] for row in trained if row.decays),
        "matmul": sum(count[row] for row in whole if row.role not in idle) + adapters,
        "trained_matmul": sum(count[row] for row in trained if row.role not in idle),
    }


def read_model_config(directory: Path) -> ModelConfig:
    """The model that `directory/config.json` describes.

    Raises:
        UserError: no such file, not JSON, or something that is not supported, by name.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{directory}: no config.json; model_name must be a model in Hugging Face layout")
    return model_config(read_json(path), str(path))


# Keys of config.json: the type of each, and the default where it may be missing or null
KEYS: dict[str, tuple[type, Any]] = {
    "vocab_size": (int, None), "hidden_size": (int, None), "intermediate_size": (int, None),
    "num_hidden_layers": (int, None), "num_attention_heads": (int, None), "max_position_embeddings": (int, None),
    "sliding_window": (int, 0), "max_window_layers": (int, 0), "layer_types": (list, []),
    "no_rope_layers": (list, []), "no_rope_layer_interval": (int, 4),
    "rms_norm_eps": (float, None), "rope_theta": (float, 10000.0), "initializer_range": (float, 0.02),
    "attention_dropout": (float, 0.0),
    "use_sliding_window": (bool, False), "attention_bias": (bool, False), "tie_word_embeddings": (bool, False),
    "architectures": (list, []),
}  # fmt: skip
LLAMA3_KEYS: dict[str, tuple[type, Any]] = dict.fromkeys(
    ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), (float, None)
)
YARN_KEYS: dict[str, tuple[type, Any]] = {
    "factor": (float, None), "beta_fast": (float, 32.0), "beta_slow": (float, 1.0), "attention_factor": (float, 0.0),
    "mscale": (float, 0.0), "mscale_all_dim": (float, 0.0), "truncate": (bool, True),
}  # fmt: skip
# Any other value of these keys asks for what is not implemented
ONLY_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"), "partial_rotary_factor": (1,), "mlp_bias": (), "rope_interleaved": (),
    "num_experts": (), "num_local_experts": (),
}  # fmt: skip


def yarn_scaling(
    fields: Mapping[str, Any], theta: float, head: int, positions: int, where: str
) -> tuple[tuple[float, ...], int]:
    """The `rope_scaling` of a `ModelConfig` by YaRN (Peng et al. 2023), with transformers' defaults, and the positions
    it reaches."""
    keys = read_keys(fields, YARN_KEYS | {"original_max_position_embeddings": (float, float(positions))}, where)
    factor, original = keys["factor"], keys["original_max_position_embeddings"]

    def pair(turns: float) -> float:
        """The pair of channels that turns so often within the original context."""
        return head * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(max(factor, 1.0)) + 1

    first, last = pair(keys["beta_fast"]), pair(keys["beta_slow"])
    if keys["truncate"]:
        first, last = float(math.floor(first)), float(math.ceil(last))
    has_scales = keys["mscale"] and keys["mscale_all_dim"]
    implied = magnitude(keys["mscale"]) / magnitude(keys["mscale_all_dim"]) if has_scales else magnitude(1.0)
    chosen = keys["attention_factor"] or implied
    return (factor, max(first, 0.0), min(last, head - 1.0), chosen), int(factor * original)


def model_config(raw: Mapping[str, Any], where: str) -> ModelConfig:
    """A `ModelConfig` from the fields of a config.json, in the form of transformers 4 or 5; `where` is for messages.

    Both may be there: as in transformers and vLLM rope_scaling then takes the place of rope_parameters.
    """
    ropes = read_keys(raw, {"rope_parameters": (dict, {}), "rope_scaling": (dict, {})}, where)
    in_force = ropes["rope_scaling"] or ropes["rope_parameters"]
    rope = {key: value for key, value in in_force.items() if value is not None}
    family, rope_type = raw.get("model_type"), rope.get("rope_type", rope.get("type", "default"))
    file_dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    for name, value, supported in (
        ("model_type", family, tuple(FAMILIES)),
        ("rope type", rope_type, ("default", "llama3", "yarn")),
        ("dtype", file_dtype, ("float32", "bfloat16", "float16")),
    ):
        if value not in supported:
            raise UserError(f"{where}: {name} {value!r} is not supported; supported are {', '.join(supported)}")
    fields = {**FAMILIES[str(family)].defaults, **raw, **rope}
    keys = read_keys(fields, KEYS, where)
    refused = [(key, fields[key]) for key, only in ONLY_VALUES.items() if fields.get(key) and fields[key] not in only]
    refused += [(f"a rope of its own for {key}", value) for key, value in rope.items() if isinstance(value, dict)]
    refused += [("architectures", name) for name in keys["architectures"] if not str(name).endswith("ForCausalLM")]
    refused += [("rope_theta", keys["rope_theta"])] if keys["rope_theta"] <= 1 else []
    for key, value in refused:
        raise UserError(f"{where}: {key} = {value!r} is not supported")
    if (theta := ropes["rope_parameters"].get("rope_theta")) not in (None, keys["rope_theta"]):
        raise UserError(
            f"{where}: rope_scaling takes the place of rope_parameters, which alone has rope_theta = {theta!r}; "
            "merge the two into rope_parameters"
        )
    heads, layers, positions = keys["num_attention_heads"], keys["num_hidden_layers"], keys["max_position_embeddings"]
    shape = {"num_key_value_heads": (int, heads), "head_dim": (int, max(keys["hidden_size"] // heads, 1))}
    kv_heads, head = read_keys(fields, shape, where).values()
    if heads % kv_heads:
        raise UserError(f"{where}: num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}")
    if head % 2:
        raise UserError(f"{where}: head_dim = {head} is odd, and rotary embedding turns pairs of channels")
    types, is_bound = keys["layer_types"], family not in ("qwen2", "qwen3") or keys["max_window_layers"] < layers
    has_window = "sliding_attention" in types if types else keys["use_sliding_window"] and is_bound
    has_window |= family == "mistral" and raw.get("use_sliding_window") is None
    scaling: tuple[float, ...] = ()
    if rope_type == "llama3":
        scaling = tuple(read_keys(rope, LLAMA3_KEYS, where).values())
    elif rope_type == "yarn":
        scaling, reach = yarn_scaling(fields, keys["rope_theta"], head, positions, where)
        positions = max(positions, reach)
    bits, scale_bits = stored_bits(raw, where)
    is_rotated = keys["no_rope_layers"] or [(layer + 1) % keys["no_rope_layer_interval"] for layer in range(layers)]
    if len(is_rotated) < layers:
        raise UserError(f"{where}: no_rope_layers = {is_rotated} says nothing of the last of {layers} layers")
    return ModelConfig(
        family=str(family),
        vocabulary_size=keys["vocab_size"],
        embed=keys["hidden_size"],
        layers=layers,
        kv_heads=kv_heads,
        group=heads // kv_heads,
        head=head,
        feedforward=keys["intermediate_size"],
        max_positions=positions,
        sliding_window=keys["sliding_window"] if has_window else 0,
        norm_epsilon=keys["rms_norm_eps"],
        rope_theta=keys["rope_theta"],
        rope_type=rope_type,
        rope_scaling=scaling,
        unrotated_layers=tuple(layer for layer in range(layers) if family == "smollm3" and not is_rotated[layer]),
        is_tied=keys["tie_word_embeddings"],
        has_bias=keys["attention_bias"] and bool(FAMILIES[str(family)].biases),
        attention_dropout=keys["attention_dropout"],
        initializer_range=keys["initializer_range"],
        file_dtype=file_dtype,
        padded_vocabulary=keys["vocab_size"],
        attention="xla",
        bits=bits,
        file_bits=bits,
        scale_bits=scale_bits,
    )


def check_sequence_length(model: ModelConfig, sequence_length: int) -> None:
    """Refuse rows longer than the model's positions or its sliding window, which is not implemented."""
    limit = model.capacity(sequence_length)
    if limit < sequence_length:
        name = "sliding window" if limit == model.sliding_window else "max_position_embeddings"
        raise UserError(
            f"sequence_length = {sequence_length} exceeds the model's {name} = {limit}; set it to {limit} or less"
        )


def check_trainable(model: ModelConfig, sequence_length: int) -> None:
    """Refuse to train a model with dropout, which is not implemented, or on rows that are too long for it, and weights
    of 8 or 4 bits."""
    if model.bits and not model.lora:
        raise UserError(
            f"weights of {model.bits} bits do not train; set lora_rank to train adapters on them, say to 16, or leave "
            "base_bits out and take a model that is not quantised"
        )
    if model.attention_dropout:
        raise UserError(
            f"attention_dropout = {model.attention_dropout} of config.json is not implemented; set it to 0 to train "
            "without"
        )
    check_sequence_length(model, sequence_length)


def initial_params(key: Key[Array, ""], model: ModelConfig) -> PyTree[Float[Array, "..."]]:
    """Random float32 weights: normal with std `initializer_range`, over √(2 × layers) for residual projections.

    The practice of GPT-2 (Radford et al. 2019) and Llama. Norm scales are one, biases and padded vocabulary rows zero.
    Of adapters the second factor is zero, so that they change nothing yet, and the first one uniform within ± 1 / √its
    inputs, as PEFT has it. Each random key is folded from the row's path, so adding a row never changes another's
    values.
    """

    def draw(path: tuple[Any, ...], row: Parameter) -> Float[Array, "..."]:
        shape = shape_of(row, model.sizes)
        if row.role in ("norm", "bias", "adapter_b"):
            return (jnp.ones if row.role == "norm" else jnp.zeros)(shape)
        scale = model.initializer_range / (math.sqrt(2 * model.layers) if row.role == "residual" else 1)
        own_key = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        if row.role == "adapter_a":
            bound = math.prod(shape[1:-1]) ** -0.5
            return jax.random.uniform(own_key, shape, minval=-bound, maxval=bound)
        if not row.axes.startswith("vocab"):
            return scale * jax.random.normal(own_key, shape)
        padding = (0, model.padded_vocabulary - model.vocabulary_size)
        return jnp.pad(scale * jax.random.normal(own_key, (model.vocabulary_size, model.embed)), (padding, (0, 0)))

    return jax.tree.map_with_path(draw, trained_table(model))


def begin_rows(params: PyTree[Array], key: Key[Array, ""], first: int, count: int, init: str) -> dict[str, Array]:
    """`count` rows for new words from row `first` on, of the embedding and of a head of its own.

    "mean" draws them from a normal with the mean and the standard deviation of each channel of the rows before (Hewitt
    2021): to what came before a new word is then as likely as an old one. The logits of a trained model are mostly far
    below zero, so rows around zero would take the probability of all old words.
    """
    begun = {}
    for name in params.keys() & VOCABULARY.keys():
        own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        old = params[name][:first].astype(jnp.float32)
        mean, spread = (jnp.mean(old, axis=0), jnp.std(old, axis=0)) if init == "mean" else (0.0, NEW_ROWS_STD)
        begun[name] = mean + spread * jax.random.normal(own_key, (count, old.shape[1]))
    return begun


def joined(frozen: PyTree | None, trained: PyTree, model: ModelConfig) -> PyTree:
    """The weights to compute with: what trains on its frozen base, of which nothing is copied; without one, itself."""
    if frozen is None:
        return trained
    factors, layers, scale = trained["layers"], dict(frozen["layers"]), model.lora.scale if model.lora else 1.0
    for name in MATRICES:
        layers[name] = Frozen(layers[name], **factors.get(name, {}), scale=scale)
    words = {name: Words(frozen[name], trained[name], ids) for name, ids in model.trained_rows}
    return frozen | {"layers": layers} | words


def cast(params: PyTree, table: PyTree[Parameter], dtype: DTypeLike) -> PyTree:
    """The weights of these rows in the dtype of compute; norm scales stay float32, and so do embedding and head.

    Those rows are cast where they are used, so that the gradient of a frequent token is summed in float32. A frozen
    matrix stays as it is stored too, and is cast within its product.
    """

    def ready(row: Parameter, weight: Any) -> Any:
        if row.role == "norm" or not row.has_layers:
            return weight
        return weight.cast(dtype) if isinstance(weight, Frozen) else weight.astype(dtype)

    return jax.tree.map(ready, table, params)


def rotary_frequencies(model: ModelConfig) -> Float[np.ndarray, " half"]:
    """Radians per position of each channel pair (Su et al. 2021), stretched by the model's rope scaling, if any."""
    frequency = model.rope_theta ** -(np.arange(0, model.head, 2) / model.head)
    if model.rope_scaling:
        factor, low, high, last = model.rope_scaling
        if model.rope_type == "llama3":
            keep = np.clip((last * frequency / (2 * np.pi) - low) / (high - low), 0, 1)
        else:
            keep = 1 - np.clip((np.arange(len(frequency)) - low) / max(high - low, 0.001), 0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / factor
    return frequency.astype(np.float32)


def rms_norm(x: Float[Array, "..."], scale: Float[Array, "*normed"], epsilon: float) -> Float[Array, "..."]:
    """Root-mean-square norm (Zhang & Sennrich 2019) over the axes of `scale`, computed in float32, returned in the
    dtype of `x`."""
    wide, axes = x.astype(jnp.float32), tuple(range(-scale.ndim, 0))
    normalized = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=axes, keepdims=True) + epsilon)
    return (normalized * scale).astype(x.dtype)


def rotation_at(position: Tokens, model: ModelConfig) -> Rotation:
    """Cosine and sine for each position and pair of channels."""
    angle = position[..., None] * rotary_frequencies(model)
    magnitude = model.rope_scaling[3] if model.rope_type == "yarn" else 1.0
    return magnitude * jnp.cos(angle), magnitude * jnp.sin(angle)


def rotate(x: Float[Array, "batch token *heads head"], rotation: Rotation) -> Float[Array, "batch token *heads head"]:
    """Rotary position embedding in the half-split layout of Llama and Qwen checkpoints, computed in float32."""
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = (jnp.expand_dims(part, range(2, x.ndim - 1)) for part in rotation)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


Attend = Callable[[Array, Array, Array], tuple[Array, Any]]


def layer_forward(
    x: Hidden, layer: PyTree[Array], number: Array | int | None, rotation: Rotation, attend: Attend, model: ModelConfig
) -> tuple[Hidden, Any]:
    """One decoder layer: attention and gated feed-forward (Shazeer 2020), each on a normed copy of the residual, or
    with its own output normed.

    `attend` maps query, key and value to their mix and a second value, which is returned: decoding's cache. The layer's
    number matters only in a model where some layers are not rotated.
    """
    if model.unrotated_layers:
        is_rotated = jnp.all(number != jnp.asarray(model.unrotated_layers))
        rotation = jnp.where(is_rotated, rotation[0], 1), jnp.where(is_rotated, rotation[1], 0)

    def norm(x: Array, name: str) -> Array:
        return rms_norm(x, layer[name], model.norm_epsilon) if name in layer else x

    normed = norm(x, "attention_norm")

    def project(x: Array, name: str) -> Array:
        bias, product = layer.get(f"{name}_bias"), linear(x, layer[name])
        return product if bias is None else product + bias.astype(product.dtype)

    query, key, value = (project(normed, name) for name in ("query", "key", "value"))
    query, key = norm(query, "query_norm"), norm(key, "key_norm")
    mixed, kept = attend(rotate(query, rotation), rotate(key, rotation), value)
    mixed = project(mixed, "output")
    x = shard_rows(x + norm(mixed, "attention_output_norm"))
    normed = norm(x, "feedforward_norm")
    hidden = jax.nn.silu(linear(normed, layer["gate"])) * linear(normed, layer["up"])
    return shard_rows(x + norm(linear(hidden, layer["down"]), "feedforward_output_norm")), kept


def embed(params: PyTree[Array], token: Tokens, dtype: DTypeLike) -> Hidden:
    """Embeddings of the tokens, in the dtype of compute."""
    return shard_rows(params["embedding"][token].astype(dtype))


def forward(
    params: PyTree[Array],
    x: Hidden,
    segment: Tokens,
    position: Tokens,
    model: ModelConfig,
    rematerialisation: str = "none",
    prompt_offset: Tokens | None = None,
) -> Hidden:
    """Embedded rows to final normed hidden states; `params` are in the dtype of compute.

    `rematerialisation` says what the backward pass computes again: nothing, all but matrix products and attention, or
    whole layers. Computing the cheap rest again costs less than writing it to memory and reading it. `prompt_offset`
    is that of `attention`.
    """

    def attend(query: Array, key: Array, value: Array) -> tuple[Array, None]:
        return attention(query, key, value, segment, model.attention, prompt_offset), None

    rotation = rotation_at(position, model)

    def next_layer(x: Array, numbered: tuple[PyTree[Array], Array | None]) -> tuple[Array, None]:
        return layer_forward(x, *numbered, rotation, attend, model)

    body: Any = next_layer
    if rematerialisation != "none":
        policies = jax.checkpoint_policies
        matmuls = policies.save_only_these_names(RESIDUAL, PRODUCT)
        policy = policies.nothing_saveable if rematerialisation == "layer" else matmuls
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)  # inside a scan nothing can be merged
    numbers = jnp.arange(model.layers) if model.unrotated_layers else None
    layers = {name: weight.stack if isinstance(weight, Frozen) else weight for name, weight in params["layers"].items()}
    x, _ = jax.lax.scan(body, x, (layers, numbers))
    return rms_norm(x, params["final_norm"], model.norm_epsilon)


def decoding_params(params: PyTree[Array], model: ModelConfig, dtype: DTypeLike) -> PyTree[Array]:
    """The weights for decoding: all but norms in the dtype of compute, and a tuple of layers instead of a stack.

    A scan over stacked layers would copy the cache in and out of its stack at every step.
    """

    def ready(row: Parameter, weight: Any) -> Any:
        return weight if row.role == "norm" else weight.astype(dtype)

    params = jax.tree.map(ready, parameter_table(model), params)
    layers = tuple(jax.tree.map(lambda leaf, at=at: leaf[at], params["layers"]) for at in range(model.layers))
    return params | {"layers": layers}


def empty_cache(model: ModelConfig, slots: int, pages: int, dtype: DTypeLike) -> Cache:
    """Room for `pages` × PAGE tokens in each slot."""
    rows = (slots, model.kv_heads, pages)
    return tuple(
        (jnp.zeros((*rows, model.head, PAGE), dtype), jnp.zeros((*rows, PAGE, model.head), dtype))
        for _ in range(model.layers)
    )


def prefill(params: PyTree[Array], token: Tokens, model: ModelConfig) -> tuple[Hidden, Cache]:
    """Hidden states of prompts, final norm applied, and the cache, padded to whole pages; what follows a shorter prompt
    is never read."""
    rotation = rotation_at(jnp.broadcast_to(jnp.arange(token.shape[1]), token.shape), model)
    segment = jnp.ones_like(token)

    def attend(query: Array, key: Array, value: Array) -> tuple[Array, tuple[Array, Array]]:
        paged = (x.reshape(x.shape[0], -1, PAGE, *x.shape[2:]) for x in (key, value))
        keys, values = (jnp.einsum("bpskh->bkpsh", x) for x in paged)
        return attention(query, key, value, segment, model.attention), (jnp.swapaxes(keys, -1, -2), values)

    x, cache = shard_rows(params["embedding"][token]), []
    for number, layer in enumerate(params["layers"]):
        x, kept = layer_forward(x, layer, number, rotation, attend, model)
        cache.append(kept)
    return rms_norm(x, params["final_norm"], model.norm_epsilon), tuple(cache)


def rotation_table(cache: Cache, model: ModelConfig) -> Rotation:
    """The rotation at each position of a cache, computed once for many steps: inside a step XLA would compute it for
    each layer, head and page."""
    return rotation_at(jnp.arange(cache[0][0].shape[2] * PAGE)[:, None], model)


def decode_step(
    params: PyTree[Array], cache: Cache, token: PerSlot, length: PerSlot, rotations: Rotation, model: ModelConfig
) -> tuple[Float[Array, "slot vocab"], Cache]:
    """Logits after one more token in each slot, and the cache with that token at `length`."""
    rotation = rotations[0][length], rotations[1][length]
    # One slot is written twice: XLA would fuse a scatter of one row into its readers and copy the cache at each step.
    slot = jnp.arange(max(len(token), 2)) % len(token)
    page, offset = length[slot] // PAGE, length[slot] % PAGE

    def attend(keys: Array, values: Array, query: Array, key: Array, value: Array) -> tuple[Array, tuple[Array, Array]]:
        keys = keys.at[slot, :, page, :, offset].set(key[slot, 0])
        values = values.at[slot, :, page, offset].set(value[slot, 0])
        return cached_attention(query[:, 0], keys, values, length)[:, None], (keys, values)

    x, grown = shard_rows(params["embedding"][token[:, None]]), []
    for number, (layer, pages) in enumerate(zip(params["layers"], cache, strict=True)):
        x, pages = layer_forward(x, layer, number, rotation, partial(attend, *pages), model)
        grown.append(pages)
    hidden = rms_norm(x, params["final_norm"], model.norm_epsilon)
    return logits_of(hidden, head_of(params, model), model.vocabulary_size)[:, 0], tuple(grown)


def cached_attention(
    query: Float[Array, "slot kv_head group head"],
    keys: Float[Array, "slot kv_head page head offset"],
    values: Float[Array, "slot kv_head page offset head"],
    length: PerSlot,
) -> Float[Array, "slot kv_head group head"]:
    """Attention of one query per slot to the tokens up to and including position `length`.

    Sums run page by page, so an empty page adds exact zeros and a result does not depend on their number. The query is
    repeated for every page so that each is a plain matrix product; without that XLA on CPU takes four times as long.
    """
    position = jnp.arange(keys.shape[2])[:, None] * PAGE + jnp.arange(PAGE)
    visible = position <= length[:, None, None]
    query = jnp.broadcast_to(query[:, :, None], (*keys.shape[:3], *query.shape[2:]))
    scores = jnp.einsum("bkpgh,bkphs->bkpgs", query, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, :, None], scores * query.shape[-1] ** -0.5, -jnp.inf)
    weights = jnp.exp(scores - jnp.max(scores, axis=(2, 4), keepdims=True))
    mixed = jnp.einsum("bkpgs,bkpsh->bkpgh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    total = jnp.sum(jnp.sum(weights, axis=4), axis=2)
    return (jnp.sum(mixed, axis=2) / total[..., None]).astype(values.dtype)


def head_of(params: PyTree[Array], model: ModelConfig) -> Any:
    """The output matrix: the embedding itself where the model ties them."""
    return params["embedding"] if model.is_tied else params["head"]


def logits_of(hidden: Hidden, head: Head, vocabulary_size: int) -> Logits:
    """Float32 logits; those of a padded vocabulary are -inf, so they have no probability and no gradient."""
    logits = scores(hidden, head)
    if logits.shape[-1] == vocabulary_size:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1]) < vocabulary_size, logits, -jnp.inf)


LOSS_CHUNK = 512  # tokens on a device, but off CPUs
TRAINED_HEAD_CHUNK = 2048  # where the head trains, whose gradient is read and written for each chunk
LossOf = Callable[[PerToken, Any], Float[Array, ""]]


def _scan_tokens(
    step: Callable[[Any, Any], tuple[Any, Any]], start: Any, rows: PyTree, most: int = LOSS_CHUNK
) -> tuple[Any, Any]:
    """`jax.lax.scan` over chunks of every row's tokens, zero-padded at the end; what it stacks becomes rows again.

    A device has at `most` so many tokens of a chunk in its part of the rows.
    """
    batch, length = jax.tree.leaves(rows)[0].shape[:2]
    rows_of_a_device = max(batch // row_shards(jax.sharding.get_abstract_mesh()), 1)
    chunk = math.ceil(length / math.ceil(length / max(1, most // rows_of_a_device)))
    count = math.ceil(length / chunk)

    def split(x: Array) -> Shaped[Array, "chunk batch chunk_token *more"]:
        return jnp.moveaxis(pad_tokens(x, count * chunk).reshape(batch, count, chunk, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Shaped[Array, "batch token *more"]:
        return jnp.moveaxis(x, 0, 1).reshape(batch, -1, *x.shape[3:])[:, :length]

    total, chunks = jax.lax.scan(step, start, jax.tree.map(split, rows))
    return total, jax.tree.map(join, chunks)


def whole_head(head: Head, dtype: DTypeLike) -> Head:
    """The head for the chunks, gathered before the loop over them, which would gather it for each."""
    if isinstance(head, Words):
        return replace(head, base=whole_head(head.base, dtype), rows=head.rows.astype(dtype))
    return shard(head.astype(dtype), AXIS_RULES["vocab"])


class TokenStatistics(NamedTuple):
    """For each target its negative log-likelihood, whether it was the likeliest token, and the entropy of the
    distribution it was predicted by; in nats."""

    loss: PerToken
    is_correct: Bool[Array, "batch token"]
    entropy: PerToken


def _chunk_statistics(
    logits: Logits, target: Tokens
) -> tuple[TokenStatistics, Logits, Bool[Array, "batch token vocab"]]:
    """Statistics of the targets, the probabilities, and which of them is each target's."""
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    is_target = target[..., None] == jnp.arange(logits.shape[-1])
    loss = normalizer - jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    probability = jnp.exp(logits - normalizer[..., None])
    entropy = normalizer - jnp.sum(probability * jnp.where(probability > 0, logits, 0), axis=-1)
    return TokenStatistics(loss, jnp.argmax(logits, axis=-1) == target, entropy), probability, is_target


def token_statistics(
    hidden: Hidden, head: Head, target: Tokens, vocabulary_size: int, temperature: float = 1.0
) -> TokenStatistics:
    """Statistics of each target, chunk by chunk; those that the caller ignores cost nothing."""
    head = whole_head(head, hidden.dtype)

    def step(_: None, chunk: tuple[Array, Array]) -> tuple[None, TokenStatistics]:
        hidden, target = chunk
        return None, _chunk_statistics(logits_of(hidden, head, vocabulary_size) / temperature, target)[0]

    return _scan_tokens(step, None, (hidden, target))[1]


def cross_entropy(log_probability: PerToken, weight: PerToken) -> Float[Array, ""]:
    """Weighted sum of the targets' negative log-likelihoods, in nats."""
    return -jnp.sum(log_probability * weight)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def summed_token_loss(
    hidden: Hidden,
    head: Head,
    target: Tokens,
    fields: PyTree,
    loss_of: LossOf,
    vocabulary_size: int,
    is_frozen: bool = False,
    temperature: float = 1.0,
) -> tuple[Float[Array, ""], TokenStatistics]:
    """The sum over targets of `loss_of` their log-probabilities and `fields`, and the targets' statistics; of a head
    that `is_frozen` there is no gradient, but of its rows that are apart. Logits are divided by the temperature in
    float32.

    It works in chunks of tokens, and the forward pass already computes each chunk's gradient from its logits: they are
    computed once, and the array [batch, token, vocab] never exists. Each device sums the head's gradient over its own
    rows, and these sums are added once. The statistics have no gradient.
    """
    statistics = token_statistics(hidden, head, target, vocabulary_size, temperature)
    return loss_of(-statistics.loss, fields), statistics


def _token_loss_forward(
    hidden: Hidden, head: Head, target: Tokens, fields: PyTree, loss_of: LossOf, vocabulary_size: int, is_frozen: bool,
    temperature: float,
) -> tuple[tuple[Array, TokenStatistics], tuple[Array, Any]]:  # fmt: skip
    parts = row_shards(jax.sharding.get_abstract_mesh())
    compute_head = whole_head(head, hidden.dtype)

    def step(total: tuple[Array, Array], chunk: tuple[Array, Array, PyTree]) -> tuple[tuple[Array, Array], Any]:
        hidden, target, fields = chunk
        logits = logits_of(hidden, compute_head, vocabulary_size) / temperature
        statistics, probability, is_target = _chunk_statistics(logits, target)
        loss, slope = jax.value_and_grad(loss_of)(-statistics.loss, fields)
        logit_gradient = (is_target - probability) * (slope / temperature)[..., None]
        logit_gradient = jax.lax.optimization_barrier(logit_gradient.astype(hidden.dtype))
        hidden_gradient, of_rows = gradient_of_scores(logit_gradient, compute_head)
        of_parts = (x.reshape(parts, -1, x.shape[-1]) for x in (of_rows, hidden))
        head_gradients = jax.vmap(product_over_tokens)(*of_parts)
        return (total[0] + loss, total[1] + head_gradients), (hidden_gradient.astype(hidden.dtype), statistics)

    trained, axis = (head.rows, None) if isinstance(head, Words) else (head, AXIS_RULES["vocab"])
    zeros = shard(jnp.zeros((parts, *trained.shape), jnp.float32), ROW_AXES, axis)
    most = LOSS_CHUNK if is_frozen or platform() == "cpu" else TRAINED_HEAD_CHUNK
    (loss, head_gradients), per_token = _scan_tokens(step, (jnp.zeros(()), zeros), (hidden, target, fields), most)
    hidden_gradient, statistics = per_token
    gradient: Any = jnp.sum(head_gradients, axis=0).astype(trained.dtype)
    gradient = replace(head, base=None, rows=gradient) if isinstance(head, Words) else gradient
    return (loss, statistics), (hidden_gradient, gradient)


def _token_loss_backward(
    loss_of: Callable, vocabulary_size: int, is_frozen: bool, temperature: float, residual: tuple[Array, Any],
    gradient: tuple[Array, Any],
) -> tuple[Array, Any, None, None]:  # fmt: skip
    hidden_gradient, head_gradient = jax.tree.map(lambda part: (part * gradient[0]).astype(part.dtype), residual)
    return hidden_gradient, head_gradient, None, None


summed_token_loss.defvjp(_token_loss_forward, _token_loss_backward)
