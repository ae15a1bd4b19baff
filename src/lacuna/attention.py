"""Attention over packed rows: one function with three backends, chosen by device.

- cudnn: NVIDIA's fused kernel, given the bounds of the documents in packed rows, on Hopper and newer.
- splash: the TPU kernel that comes with JAX, with segment ids.
- xla: block by block, everywhere.

None of them holds the scores of a whole row, and tokens attend only within their document. The xla backend can also let
a completion attend to its prompt.
"""

import math
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused_attention  # packed rows have no public name yet
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from lacuna.config import ModelKeys, UserError
from lacuna.distributed import AXIS_RULES, ROW_AXES, platform

Backend = Literal["cudnn", "splash", "xla"]
Query = Float[Array, "batch token kv_head group head"]
KeyValue = Float[Array, "batch token kv_head head"]
Segment = Int[Array, "batch token"]

XLA_BLOCK = {"cpu": 128}  # tokens, elsewhere 512, which takes up to twice as long on a CPU
SPLASH_BLOCKS = (512, 256, 128)
MOST_DOCUMENTS = 64  # in a row for cuDNN's kernel, which keeps a float for each token, head and possible document
PADDING = -1  # the segment of tokens that fill a row up to whole blocks
RESIDUAL = "attention"  # names what attention keeps for its backward pass
HIDDEN = -1e30  # finite, so that a block without a visible key makes no NaN

_einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


def choose_backend(config: ModelKeys, mesh: Mesh, head: int) -> tuple[Backend, str]:
    """The backend for heads of `head` channels on these devices, and the start-up line that names it.

    Raises:
        UserError: the config asks for a backend that can't run here.
    """
    device = mesh.devices.flat[0]
    is_gpu = device.platform in ("gpu", "cuda")
    obstacles: dict[Backend, str] = {"cudnn": "", "splash": "", "xla": ""}
    if not is_gpu:
        obstacles["cudnn"] = f"cuDNN runs on NVIDIA GPUs, and this is {device.device_kind}"
    elif not is_hopper(getattr(device, "compute_capability", "")):
        obstacles["cudnn"] = f"cuDNN's packed form needs Hopper or newer, and this is {device.device_kind}"
    elif config.compute_dtype == "float32":
        obstacles["cudnn"] = f"cuDNN's kernel needs bfloat16, and compute_dtype is {config.compute_dtype}"
    elif head % 8 or head > 256:
        obstacles["cudnn"] = f"cuDNN's kernel needs heads of a multiple of 8 up to 256, and the model's are {head}"
    if device.platform != "tpu":
        obstacles["splash"] = f"the splash kernel runs on TPUs, and this is {device.device_kind}"
    if config.attention != "auto" and (obstacle := obstacles[config.attention]):
        raise UserError(f"attention = {config.attention}: {obstacle}; set attention to auto or xla")
    is_auto = config.attention == "auto"
    backend = next(name for name in obstacles if not obstacles[name]) if is_auto else config.attention
    names = {"cudnn": "cuDNN, packed rows", "splash": "splash kernel", "xla": "XLA, in blocks"}
    reason = f" ({obstacles['cudnn']})" if is_auto and is_gpu and backend == "xla" else ""
    return backend, f"attention: {names[backend]}{reason}"


def is_hopper(capability: str) -> bool:
    """Whether an NVIDIA GPU of this compute capability is of the Hopper generation or newer; AMD's are not numbers."""
    return capability.replace(".", "", 1).isdecimal() and float(capability) >= 9.0


def attention(
    query: Query, key: KeyValue, value: KeyValue, segment: Segment, backend: str, prompt_offset: Segment | None = None
) -> Query:
    """Causal grouped-query attention confined to each packed document; padding, segment 0, sees padding alone.

    The tokens of a document are adjacent. With the backend xla a document may also attend to one before it, as a
    completion to its prompt: `prompt_offset` is how many documents back that one is, 0 where there is none. Each device
    works on its own rows and heads.
    """
    local: Any = {"cudnn": cudnn_attention, "splash": splash_attention, "xla": xla_attention}[backend]
    assert prompt_offset is None or backend == "xla"
    arrays = [x for x in (query, key, value, segment, prompt_offset) if x is not None]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(*arrays)
    heads, rows = PartitionSpec(ROW_AXES, None, AXIS_RULES["kv_head"]), PartitionSpec(ROW_AXES)
    specs = (heads, heads, heads, rows, rows)[: len(arrays)]
    return jax.shard_map(local, in_specs=specs, out_specs=heads, check_vma=False)(*arrays)


def is_first_token(segment: Segment) -> Bool[Array, "batch token"]:
    """Whether a token is the first of its document."""
    return jnp.pad(segment[:, 1:] != segment[:, :-1], ((0, 0), (1, 0)), constant_values=True)


def pad_tokens(
    x: Shaped[Array, "batch token *more"], length: int, filling: int = 0
) -> Shaped[Array, "batch length *more"]:
    """Rows of `length` tokens, filled at the end."""
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1]), *[(0, 0)] * (x.ndim - 2)], constant_values=filling)


# cuDNN


@jax.custom_vjp
def cudnn_attention(query: Query, key: KeyValue, value: KeyValue, segment: Segment) -> Query:
    """cuDNN's fused kernel, or XLA for a batch with more documents in a row than the kernel has room for.

    The gradient is defined here because JAX's own, for a choice between two, would keep the residuals of both.
    """
    return _cudnn_forward(query, key, value, segment)[0]


def document_bounds(
    segment: Segment, most: int
) -> tuple[Int[Array, "batch document"], Int[Array, "batch document_or_end"]]:
    """Length and first token of each row's documents, in cuDNN's form: -1 where there are no more."""
    length = segment.shape[1]
    find = partial(jnp.nonzero, size=most + 1, fill_value=length)
    first = jax.vmap(lambda row: find(row)[0])(is_first_token(segment)).astype(jnp.int32)
    return jnp.where(first[:, :-1] < length, jnp.diff(first), -1), jnp.where(first < length, first, -1)


def _cudnn_inputs(query: Query, key: KeyValue, value: KeyValue, segment: Segment) -> tuple[tuple, tuple]:
    """Query, key and value with heads on one axis, and lengths and offsets of the documents for queries and for keys.

    There are as many heads of keys as of queries: jax 0.10.2 finds packed keys by the stride of the queries.
    """
    key, value = (jnp.repeat(x, query.shape[3], axis=2) for x in (key, value))
    lengths, offsets = document_bounds(segment, MOST_DOCUMENTS)
    return (query.reshape(key.shape), key, value), (lengths, lengths, offsets, offsets)


def _has_room(segment: Segment) -> Bool[Array, ""]:
    return jnp.all(jnp.sum(is_first_token(segment), axis=1) <= MOST_DOCUMENTS)


def _cudnn_forward(query: Query, key: KeyValue, value: KeyValue, segment: Segment) -> tuple[Array, tuple]:
    batch, length, kv_heads, group, head = query.shape

    def by_cudnn(query: Query, key: KeyValue, value: KeyValue) -> tuple[Array, Array]:
        heads, documents = _cudnn_inputs(query, key, value, segment)
        mixed, statistics = fused_attention.dot_product_attention(
            *heads,
            None,  # bias
            None,  # mask
            *documents,
            scale=head**-0.5,
            mask_type=fused_attention.MaskType.PADDING_CAUSAL,
            return_residual=True,
        )
        return mixed.reshape(query.shape), statistics

    def by_xla(query: Query, key: KeyValue, value: KeyValue) -> tuple[Array, Array]:
        no_statistics = jnp.zeros((batch * MOST_DOCUMENTS, kv_heads * group, length), jnp.float32)
        return xla_attention(query, key, value, segment), no_statistics

    kept = jax.lax.cond(_has_room(segment), by_cudnn, by_xla, query, key, value)
    mixed, statistics = checkpoint_name(kept, RESIDUAL)
    return mixed, (query, key, value, segment, mixed, statistics)


def _cudnn_backward(residual: tuple, gradient: Array) -> tuple[Array, Array, Array, None]:
    query, key, value, segment, mixed, statistics = residual

    def by_cudnn(query: Query, key: KeyValue, value: KeyValue) -> tuple[Array, ...]:
        heads, documents = _cudnn_inputs(query, key, value, segment)
        unused = jnp.zeros(0, query.dtype)
        gradients = fused_attention._dot_product_attention_bwd_p_wrapper.bind(
            *(*heads, unused, *documents, unused, unused, statistics),
            *(x.reshape(heads[0].shape) for x in (mixed, gradient)),
            scale=query.shape[-1] ** -0.5,
            seed=42,  # of dropout, which there is none of
            dropout_rate=0.0,
            variadic_args=(False, False),
            mask_type=fused_attention.MaskType.PADDING_CAUSAL,
            layout=fused_attention.AttentionLayout.BTNH.value,
            sliding_window_length=None,
        )
        of_query, of_key, of_value = (x.reshape(query.shape) for x in gradients)
        return of_query, *(jnp.sum(x, axis=3, dtype=jnp.float32).astype(key.dtype) for x in (of_key, of_value))

    def by_xla(query: Query, key: KeyValue, value: KeyValue) -> tuple[Array, ...]:
        return jax.vjp(partial(xla_attention, segment=segment), query, key, value)[1](gradient)

    return *jax.lax.cond(_has_room(segment), by_cudnn, by_xla, query, key, value), None


cudnn_attention.defvjp(_cudnn_forward, _cudnn_backward)


# TPU


def splash_attention(query: Query, key: KeyValue, value: KeyValue, segment: Segment, interpret: bool = False) -> Query:
    """The TPU kernel that comes with JAX; `interpret` runs it anywhere, slowly."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    batch, length, kv_heads, group, head = query.shape
    padded = math.ceil(length / SPLASH_BLOCKS[-1]) * SPLASH_BLOCKS[-1]
    block = next(size for size in SPLASH_BLOCKS if padded % size == 0)
    segment = pad_tokens(segment, padded, PADDING)
    query = pad_tokens(query * head**-0.5, padded).reshape(batch, padded, -1, head)
    heads = (jnp.swapaxes(x, 1, 2) for x in (query, pad_tokens(key, padded), pad_tokens(value, padded)))
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.CausalMask((padded, padded))] * kv_heads * group),
        block_sizes=splash.BlockSizes(
            block_q=block, block_kv=block, block_kv_compute=block,
            block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
        ),
        residual_checkpoint_name=RESIDUAL,
        interpret=interpret,
    )  # fmt: skip
    mixed = jax.vmap(kernel)(*heads, splash.SegmentIds(segment, segment))
    return jnp.swapaxes(mixed, 1, 2)[:, :length].reshape(batch, length, kv_heads, group, head)


# XLA


def xla_attention(
    query: Query, key: KeyValue, value: KeyValue, segment: Segment, prompt_offset: Segment | None = None
) -> Query:
    """Block by block, over those blocks of keys that any row's documents need."""
    length, block = query.shape[1], XLA_BLOCK.get(platform(), 512)
    block = min(block if prompt_offset is None else block // 2, length)  # completions tend to be short
    padded = math.ceil(length / block) * block
    segment = pad_tokens(segment, padded, PADDING)
    # Each token of padding is a document of its own, so that it needs no other block.
    document = jnp.cumsum(is_first_token(segment) | (segment <= 0), axis=1, dtype=jnp.int32)
    prompt = document if prompt_offset is None else document - pad_tokens(prompt_offset, padded)
    query, key, value = (pad_tokens(x, padded) for x in (query, key, value))
    return blockwise(query, key, value, document, prompt, block)[:, :length]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def blockwise(query: Query, key: KeyValue, value: KeyValue, document: Segment, prompt: Segment, block: int) -> Query:
    """Attention with a running softmax (cf. Dao et al. 2022); the backward pass computes the scores again.

    `document` numbers each row's documents in their order; `prompt` is the document that a token attends to besides its
    own, or its own where there is none.
    """
    return _blockwise_forward(query, key, value, document, prompt, block)[0]


def _to_blocks(
    x: Shaped[Array, "batch token *heads head"], block: int
) -> Shaped[Array, "block batch kv_head query head"]:
    """Blocks of tokens, with a block's tokens and their groups on one axis."""
    batch, length, kv_heads, *_, head = x.shape
    x = x.reshape(batch, length // block, block, kv_heads, -1, head)
    return x.transpose(1, 0, 3, 2, 4, 5).reshape(length // block, batch, kv_heads, -1, head)


def _from_blocks(x: Shaped[Array, "block batch kv_head query head"], like: Array) -> Array:
    """The inverse, in the shape and dtype of `like`."""
    blocks, batch, kv_heads, _, head = x.shape
    x = x.reshape(blocks, batch, kv_heads, like.shape[1] // blocks, -1, head)
    return x.transpose(1, 0, 3, 2, 4, 5).reshape(like.shape).astype(like.dtype)


def _needed_blocks(
    document: Segment, prompt: Segment, block: int
) -> tuple[Int[Array, " block"], Int[Array, "block key_block"], Int[Array, " block"]]:
    """Each block of queries: its number, the blocks of keys that it needs, before all others, and their count."""
    document, prompt = (x.reshape(len(x), -1, block) for x in (document, prompt))
    first, last = document[..., 0], document[..., -1]
    has_own = last[:, None] >= first[:, :, None]
    prompt, first, last = prompt[..., None], first[:, None, None], last[:, None, None]
    has_prompt = jnp.any((first <= prompt) & (prompt <= last), axis=2)
    is_needed = jnp.any(has_own | has_prompt, axis=0) & jnp.tri(document.shape[1], dtype=bool)
    order = jnp.argsort(~is_needed, axis=1, stable=True).astype(jnp.int32)
    return jnp.arange(len(order), dtype=jnp.int32), order, jnp.sum(is_needed, axis=1, dtype=jnp.int32)


def _scores(
    queries: Array, keys: Array, document: Segment, prompt: Segment, query_block: Array, key_block: Array
) -> Float[Array, "batch kv_head query key"]:
    """Scores of one block of queries for one block of keys, HIDDEN where a query may not see a key."""
    block = keys.shape[2]

    def part(x: Segment, number: Array) -> Int[Array, "batch block_token"]:
        return jax.lax.dynamic_slice_in_dim(x, number * block, block, axis=1)

    token, key_document = jnp.arange(block), part(document, key_block)[:, None]
    is_own = part(document, query_block)[:, :, None] == key_document
    is_prompt = part(prompt, query_block)[:, :, None] == key_document
    is_past = (query_block * block + token)[:, None] >= key_block * block + token
    is_visible = jnp.repeat((is_own | is_prompt) & is_past, queries.shape[2] // block, axis=1)
    scores = _einsum("bkth,bksh->bkts", queries, keys)
    return jnp.where(is_visible[:, None], scores * queries.shape[-1] ** -0.5, HIDDEN)


def _blockwise_forward(
    query: Array, key: Array, value: Array, document: Array, prompt: Array, block: int
) -> tuple[Array, tuple]:
    keys, values = _to_blocks(key, block), _to_blocks(value, block)

    def mix(_: None, given: tuple[Array, ...]) -> tuple[None, tuple[Array, Array]]:
        """The result of a block of queries and the logarithms of their softmax's denominators."""
        query_block, key_blocks, count, queries = given

        def add(step: Array, running: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            mixed, peak, total = running
            at = key_blocks[step]
            scores = _scores(queries, keys[at], document, prompt, query_block, at)
            new_peak = jnp.maximum(peak, jnp.max(scores, axis=-1))
            weights, decay = jnp.exp(scores - new_peak[..., None]), jnp.exp(peak - new_peak)
            added = _einsum("bkts,bksh->bkth", weights.astype(value.dtype), values[at])
            return mixed * decay[..., None] + added, new_peak, total * decay + jnp.sum(weights, axis=-1)

        zero = jnp.zeros(queries.shape[:-1], jnp.float32)
        start = jnp.zeros(queries.shape, jnp.float32), zero + HIDDEN, zero
        mixed, peak, total = jax.lax.fori_loop(0, count, add, start)
        return None, ((mixed / total[..., None]).astype(query.dtype), peak + jnp.log(total))

    given = *_needed_blocks(document, prompt, block), _to_blocks(query, block)
    mixed, normalizer = checkpoint_name(jax.lax.scan(mix, None, given)[1], RESIDUAL)
    return _from_blocks(mixed, query), (query, key, value, document, prompt, mixed, normalizer)


def _blockwise_backward(block: int, residual: tuple, gradient: Array) -> tuple[Array, Array, Array, None, None]:
    query, key, value, document, prompt, mixed, normalizer = residual
    keys, values, gradients = (_to_blocks(x, block) for x in (key, value, gradient))
    agreement = jnp.sum(mixed.astype(jnp.float32) * gradients, axis=-1)

    def differentiate(totals: tuple[Array, Array], given: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        """The gradients of all keys and values with those from a block of queries added, and that of these queries."""
        query_block, key_blocks, count, queries, upstream, normalizer, agreement = given

        def add(step: Array, running: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            of_queries, of_keys, of_values = running
            at = key_blocks[step]
            scores = _scores(queries, keys[at], document, prompt, query_block, at)
            weights = jnp.exp(scores - normalizer[..., None])
            slope = _einsum("bkth,bksh->bkts", upstream, values[at]) - agreement[..., None]
            slope = (weights * slope * query.shape[-1] ** -0.5).astype(query.dtype)
            of_keys = of_keys.at[at].add(_einsum("bkts,bkth->bksh", slope, queries))
            of_values = of_values.at[at].add(_einsum("bkts,bkth->bksh", weights.astype(query.dtype), upstream))
            return of_queries + _einsum("bkts,bksh->bkth", slope, keys[at]), of_keys, of_values

        start = jnp.zeros(queries.shape, jnp.float32), *totals
        of_queries, of_keys, of_values = jax.lax.fori_loop(0, count, add, start)
        return (of_keys, of_values), of_queries.astype(query.dtype)

    zero = jnp.zeros(keys.shape, jnp.float32)
    given = *_needed_blocks(document, prompt, block), _to_blocks(query, block)
    totals, of_query = jax.lax.scan(differentiate, (zero, zero), (*given, gradients, normalizer, agreement))
    return _from_blocks(of_query, query), _from_blocks(totals[0], key), _from_blocks(totals[1], value), None, None


blockwise.defvjp(_blockwise_forward, _blockwise_backward)
