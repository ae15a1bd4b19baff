"""Attention over packed rows, as one function with three backends that are chosen by device.

- cudnn: NVIDIA's fused kernel with the packed rows' offsets, on Hopper and newer.
- splash: the TPU kernel that comes with JAX, with segment ids.
- xla: block by block, everywhere.

No score array of a whole row exists in any of them, and none attends from one document to another, but where xla is
told that documents go on from another, as grpo's completions do from their prompt.
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused_attention  # packed rows have no public name yet
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from lacuna.config import ModelKeys, UserError
from lacuna.distributed import AXIS_RULES, ROW_AXES, platform

Backend = Literal["cudnn", "splash", "xla"]
Query = Float[Array, "batch token kv_head group head"]
KeyOrValue = Float[Array, "batch token kv_head head"]
Segment = Int[Array, "batch token"]

XLA_BLOCK = {"cpu": 128}  # tokens; a block of 512 takes up to twice as long there
SPLASH_BLOCKS = (512, 256, 128)
MOST_DOCUMENTS = 64  # in a row for cuDNN's kernel, which keeps a float for each token, head and possible document
RESIDUAL = "attention"  # names what attention leaves for its backward pass
HIDDEN = -1e30  # finite, so that a block without a visible key makes no NaN


def choose_backend(config: ModelKeys, mesh: Mesh, head: int) -> tuple[Backend, str]:
    """The backend for a model with heads of that size on these devices, and the start-up line that names it.

    Raises:
        UserError: the page asks for one that can't run here.
    """
    device = mesh.devices.flat[0]
    against: dict[str, str] = {"cudnn": "", "splash": "", "xla": ""}
    if device.platform not in ("gpu", "cuda"):
        against["cudnn"] = f"cuDNN runs on NVIDIA GPUs, and this is {device.device_kind}"
    elif not is_hopper(getattr(device, "compute_capability", "")):
        against["cudnn"] = f"cuDNN's packed form needs Hopper or newer, and this is {device.device_kind}"
    elif config.compute_dtype != "bfloat16":
        against["cudnn"] = f"cuDNN's kernel needs bfloat16, and compute_dtype is {config.compute_dtype}"
    elif head % 8 or head > 256:
        against["cudnn"] = f"cuDNN's kernel needs heads of a multiple of 8 up to 256, and the model's are {head}"
    if device.platform != "tpu":
        against["splash"] = f"the splash kernel runs on TPUs, and this is {device.device_kind}"
    names: dict[Backend, str] = {"cudnn": "cuDNN, packed rows", "splash": "splash kernel", "xla": "XLA, in blocks"}
    if config.attention != "auto":
        if against[config.attention]:
            raise UserError(
                f"attention = {config.attention}: {against[config.attention]}; set attention to auto or xla"
            )
        return config.attention, f"attention: {names[config.attention]}"
    backend = next(name for name in names if not against[name])
    is_second_best = backend == "xla" and device.platform in ("gpu", "cuda")
    return backend, f"attention: {names[backend]}" + (f" ({against['cudnn']})" if is_second_best else "")


def is_hopper(capability: str) -> bool:
    """Whether an NVIDIA GPU of this compute capability is of the Hopper generation or newer."""
    return capability.replace(".", "", 1).isdecimal() and float(capability) >= 9.0


def attention(
    query: Query,
    key: KeyOrValue,
    value: KeyOrValue,
    segment: Segment,
    backend: str,
    prompt_offset: Segment | None = None,
) -> Query:
    """Causal grouped-query attention confined to each packed document; padding, segment 0, sees padding alone.

    The tokens of a document are adjacent. With the backend xla a document may also attend to one before it, as a
    completion to its prompt: `prompt_offset` is how many documents back that one is, 0 where there is none. Each device
    works on its own rows and heads.
    """
    local: Any = {"cudnn": cudnn_attention, "splash": splash_attention, "xla": xla_attention}[backend]
    assert prompt_offset is None or backend == "xla"
    given = (query, key, value, segment) if prompt_offset is None else (query, key, value, segment, prompt_offset)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(*given)
    heads, rows = PartitionSpec(ROW_AXES, None, AXIS_RULES["kv_head"]), PartitionSpec(ROW_AXES)
    specs = (heads, heads, heads, rows, rows)[: len(given)]
    return jax.shard_map(local, in_specs=specs, out_specs=heads, check_vma=False)(*given)


def begins(segment: Segment) -> Bool[Array, "batch token"]:
    """Whether a token is the first of its document."""
    return jnp.pad(segment[:, 1:] != segment[:, :-1], ((0, 0), (1, 0)), constant_values=True)


def padded(length: int, query: Query, key: KeyOrValue, value: KeyOrValue, segment: Segment) -> tuple[Array, ...]:
    """The arrays with rows of `length` tokens; those added are a document of their own."""

    def pad(x: Array, filling: int = 0) -> Array:
        return jnp.pad(x, [(0, 0), (0, length - x.shape[1]), *[(0, 0)] * (x.ndim - 2)], constant_values=filling)

    return pad(query), pad(key), pad(value), pad(segment, -1)


# cuDNN


@jax.custom_vjp
def cudnn_attention(query: Query, key: KeyOrValue, value: KeyOrValue, segment: Segment) -> Query:
    """By cuDNN's fused kernel, or by XLA a batch with more documents in a row than the kernel has room for.

    The gradient is our own so that only one of the two leaves anything behind for it.
    """
    return _cudnn_forward(query, key, value, segment)[0]


def places_of_documents(
    segment: Segment, most: int
) -> tuple[Int[Array, "batch document"], Int[Array, "batch document_or_end"]]:
    """Lengths of each row's documents and where they begin, as cuDNN takes them: -1 where there are no more."""
    length = segment.shape[1]
    find = partial(jnp.nonzero, size=most + 1, fill_value=length)
    first = jax.vmap(lambda row: find(row)[0])(begins(segment)).astype(jnp.int32)
    return jnp.where(first[:, :-1] < length, jnp.diff(first), -1), jnp.where(first < length, first, -1)


def _cudnn_arguments(query: Query, key: KeyOrValue, value: KeyOrValue) -> tuple[Array, Array, Array]:
    """Heads on one axis, as many keys as queries: jax 0.10.2 finds packed keys by the stride of the queries."""
    key, value = (jnp.repeat(x, query.shape[3], axis=2) for x in (key, value))
    return query.reshape(key.shape), key, value


def _has_room(segment: Segment) -> Bool[Array, ""]:
    return jnp.all(jnp.sum(begins(segment), axis=1) <= MOST_DOCUMENTS)


def _cudnn_forward(query: Query, key: KeyOrValue, value: KeyOrValue, segment: Segment) -> tuple[Array, tuple]:
    batch, length, kv_heads, group, head = query.shape

    def packed(query: Query, key: KeyOrValue, value: KeyOrValue) -> tuple[Array, Array]:
        lengths, offsets = places_of_documents(segment, MOST_DOCUMENTS)
        mixed, statistics = fused_attention.dot_product_attention(
            *_cudnn_arguments(query, key, value),
            q_seqlen=lengths,
            kv_seqlen=lengths,
            q_offsets=offsets,
            kv_offsets=offsets,
            scale=head**-0.5,
            mask_type=fused_attention.MaskType.PADDING_CAUSAL,
            return_residual=True,
        )
        return mixed.reshape(query.shape), statistics

    def in_blocks(query: Query, key: KeyOrValue, value: KeyOrValue) -> tuple[Array, Array]:
        statistics = jnp.zeros((batch * MOST_DOCUMENTS, kv_heads * group, length), jnp.float32)
        return xla_attention(query, key, value, segment), statistics

    kept = jax.lax.cond(_has_room(segment), packed, in_blocks, query, key, value)
    mixed, statistics = checkpoint_name(kept, RESIDUAL)
    return mixed, (query, key, value, segment, mixed, statistics)


def _cudnn_backward(residual: tuple, gradient: Array) -> tuple[Array, Array, Array, None]:
    query, key, value, segment, mixed, statistics = residual

    def packed(query: Query, key: KeyOrValue, value: KeyOrValue) -> tuple[Array, ...]:
        heads = _cudnn_arguments(query, key, value)
        lengths, offsets = places_of_documents(segment, MOST_DOCUMENTS)
        unused = jnp.zeros(0, query.dtype)
        gradients = fused_attention._dot_product_attention_bwd_p_wrapper.bind(
            *heads,
            unused,
            lengths,
            lengths,
            offsets,
            offsets,
            unused,
            unused,
            statistics,
            *(x.reshape(heads[0].shape) for x in (mixed, gradient)),
            scale=query.shape[-1] ** -0.5,
            seed=42,
            dropout_rate=0.0,
            variadic_args=(False, False),
            mask_type=fused_attention.MaskType.PADDING_CAUSAL,
            layout=fused_attention.AttentionLayout.BTNH.value,
            sliding_window_length=None,
        )
        of_query, of_key, of_value = (x.reshape(query.shape) for x in gradients)
        return of_query, *(jnp.sum(x, axis=3, dtype=jnp.float32).astype(key.dtype) for x in (of_key, of_value))

    def in_blocks(query: Query, key: KeyOrValue, value: KeyOrValue) -> tuple[Array, ...]:
        return jax.vjp(partial(xla_attention, segment=segment), query, key, value)[1](gradient)

    return *jax.lax.cond(_has_room(segment), packed, in_blocks, query, key, value), None


cudnn_attention.defvjp(_cudnn_forward, _cudnn_backward)


# TPU


def splash_attention(
    query: Query, key: KeyOrValue, value: KeyOrValue, segment: Segment, interpret: bool = False
) -> Query:
    """By the TPU kernel that comes with JAX; `interpret` runs it anywhere, slowly."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape, step = query.shape, SPLASH_BLOCKS[-1]
    length = -(-shape[1] // step) * step
    query, key, value, segment = padded(length, query, key, value, segment)
    query = (query * shape[-1] ** -0.5).reshape(shape[0], length, -1, shape[-1])
    block = next(size for size in SPLASH_BLOCKS if length % size == 0)
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.CausalMask((length, length))] * query.shape[2]),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),  # fmt: skip
        residual_checkpoint_name=RESIDUAL,
        interpret=interpret,
    )
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    mixed = jax.vmap(kernel)(query, key, value, splash.SegmentIds(segment, segment))
    return jnp.swapaxes(mixed, 1, 2)[:, : shape[1]].reshape(shape)


# XLA


def xla_attention(
    query: Query, key: KeyOrValue, value: KeyOrValue, segment: Segment, prompt_offset: Segment | None = None
) -> Query:
    """Block by block, with those blocks of keys that any row's documents ask for."""
    length, block = query.shape[1], XLA_BLOCK.get(platform(), 512)
    block = min(block if prompt_offset is None else block // 2, length)  # completions tend to be short
    query, key, value, segment = padded(-(-length // block) * block, query, key, value, segment)
    document = jnp.cumsum(begins(segment) | (segment <= 0), axis=1, dtype=jnp.int32)  # padding asks for nothing
    before = (
        None if prompt_offset is None else document - jnp.pad(prompt_offset, [(0, 0), (0, document.shape[1] - length)])
    )
    return blockwise(query, key, value, document, before, block)[:, :length]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def blockwise(
    query: Query, key: KeyOrValue, value: KeyOrValue, document: Segment, before: Segment | None, block: int
) -> Query:
    """Attention with a running softmax (cf. Dao et al. 2022); the backward pass makes the scores again.

    `document` numbers each row's documents in their order; `before` is the document that a token's own goes on from,
    its own again where there is none.
    """
    return _blockwise_forward(query, key, value, document, before, block)[0]


def _blocks(x: Array, block: int) -> Float[Array, "block batch kv_head query head"]:
    """Heads over blocks of tokens, each block's tokens and groups on one axis."""
    batch, length, kv_heads, *group, head = x.shape
    x = x.reshape(batch, length // block, block, kv_heads, *group, head)
    x = jnp.moveaxis(x, (1, 3), (0, 2))
    return x.reshape(*x.shape[:3], -1, head)


def _rows(x: Float[Array, "block batch kv_head query head"], like: Array) -> Array:
    """Back from blocks to the shape and dtype of `like`."""
    batch, _, kv_heads, *group, head = like.shape
    x = x.reshape(x.shape[0], batch, kv_heads, -1, *group, head)
    return jnp.moveaxis(x, (0, 2), (1, 3)).reshape(like.shape).astype(like.dtype)


def _needed_blocks(
    document: Segment, before: Segment | None, block: int
) -> tuple[Int[Array, "block key_block"], Int[Array, " block"]]:
    """The blocks of keys that each block of queries needs, ahead of those that it does not, and how many they are."""
    parts = document.reshape(len(document), -1, block)
    first, last = parts[..., 0], parts[..., -1]
    asked = last[:, None] >= first[..., None]
    if before is not None:
        wanted = before.reshape(*parts.shape, 1)
        asked |= jnp.any((first[:, None, None] <= wanted) & (wanted <= last[:, None, None]), axis=2)
    asked = jnp.any(asked, axis=0) & jnp.tri(parts.shape[1], dtype=bool)
    return jnp.argsort(~asked, axis=1, stable=True).astype(jnp.int32), jnp.sum(asked, axis=1, dtype=jnp.int32)


def _scores(query: Array, key: Array, document: Segment, before: Segment | None, number: Array, at: Array) -> Array:
    """Scores [batch, kv_head, query, key] of block `number` of queries for block `at` of keys, some of them hidden."""
    block = key.shape[2]

    def part(x: Segment, number: Array) -> Int[Array, "batch block_token"]:
        return jax.lax.dynamic_slice_in_dim(x, number * block, block, axis=1)

    here, there, place = part(document, number)[:, :, None], part(document, at)[:, None], jnp.arange(block)
    is_own = here == there
    if before is not None:
        is_own |= part(before, number)[:, :, None] == there
    is_past = (number * block + place)[:, None] >= at * block + place
    visible = jnp.repeat(is_own & is_past, query.shape[2] // block, axis=1)
    scores = jnp.einsum("bkth,bksh->bkts", query, key, preferred_element_type=jnp.float32)
    return jnp.where(visible[:, None], scores * query.shape[-1] ** -0.5, HIDDEN)


def _blockwise_forward(
    query: Array, key: Array, value: Array, document: Array, before: Array | None, block: int
) -> tuple[Array, tuple]:
    keys, values = _blocks(key, block), _blocks(value, block)

    def attend(_: None, xs: tuple[Array, ...]) -> tuple[None, tuple[Array, Array]]:
        number, order, count, query = xs

        def add(place: Array, running: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            mixed, peak, total = running
            at = order[place]
            scores = _scores(query, keys[at], document, before, number, at)
            highest = jnp.maximum(peak, jnp.max(scores, axis=-1))
            weights, decay = jnp.exp(scores - highest[..., None]), jnp.exp(peak - highest)
            new = jnp.einsum(
                "bkts,bksh->bkth", weights.astype(value.dtype), values[at], preferred_element_type=jnp.float32
            )
            return mixed * decay[..., None] + new, highest, total * decay + jnp.sum(weights, axis=-1)

        zero = jnp.zeros(query.shape[:-1], jnp.float32)
        start = jnp.zeros(query.shape, jnp.float32), zero + HIDDEN, zero
        mixed, peak, total = jax.lax.fori_loop(0, count, add, start)
        return None, ((mixed / total[..., None]).astype(query.dtype), peak + jnp.log(total))

    numbers = jnp.arange(len(keys), dtype=jnp.int32)
    blocks = numbers, *_needed_blocks(document, before, block), _blocks(query, block)
    _, kept = jax.lax.scan(attend, None, blocks)
    mixed, normalizer = checkpoint_name(kept, RESIDUAL)
    return _rows(mixed, query), (query, key, value, document, before, mixed, normalizer)


def _blockwise_backward(block: int, residual: tuple, gradient: Array) -> tuple[Array, Array, Array, None, None]:
    query, key, value, document, before, mixed, normalizer = residual
    keys, values = _blocks(key, block), _blocks(value, block)
    gradients = _blocks(gradient, block)
    agreement = jnp.sum(mixed.astype(jnp.float32) * gradients, axis=-1)
    einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def attend(sums: tuple[Array, Array], xs: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        number, order, count, query, gradient, normalizer, agreement = xs

        def add(place: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            of_query, of_keys, of_values = sums
            at = order[place]
            weights = jnp.exp(_scores(query, keys[at], document, before, number, at) - normalizer[..., None])
            slope = einsum("bkth,bksh->bkts", gradient, values[at]) - agreement[..., None]
            slope = (weights * slope * query.shape[-1] ** -0.5).astype(query.dtype)
            of_key = einsum("bkts,bkth->bksh", slope, query)
            of_value = einsum("bkts,bkth->bksh", weights.astype(query.dtype), gradient)
            of_query += einsum("bkts,bksh->bkth", slope, keys[at])
            return of_query, of_keys.at[at].add(of_key), of_values.at[at].add(of_value)

        start = jnp.zeros(query.shape, jnp.float32), *sums
        of_query, of_keys, of_values = jax.lax.fori_loop(0, count, add, start)
        return (of_keys, of_values), of_query.astype(query.dtype)

    zero = jnp.zeros(keys.shape, jnp.float32)
    numbers = jnp.arange(len(keys), dtype=jnp.int32)
    blocks = numbers, *_needed_blocks(document, before, block), _blocks(query, block)
    sums, of_query = jax.lax.scan(attend, (zero, zero), (*blocks, gradients, normalizer, agreement))
    return _rows(of_query, query), _rows(sums[0], key), _rows(sums[1], value), None, None


blockwise.defvjp(_blockwise_forward, _blockwise_backward)
