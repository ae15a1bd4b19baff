"""Every backend of attention against a plain float64 formula, document by document, and the choice between them."""

import importlib.util
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lacuna import attention
from lacuna.attention import fused_attention
from lacuna.config import ModelKeys, UserError

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
# Of two rows: lengths of the documents, what is left over being padding. No length is a multiple of a block.
ROWS = {
    "ragged": (301, [[140, 3, 118], [1, 299]]),
    "blocks": (256, [[128, 128], [30, 50, 100]]),
    "short": (7, [[7], [2, 4]]),
}


def segments(length: int, rows: list[list[int]]) -> np.ndarray:
    segment = np.zeros((len(rows), length), np.int32)
    for row, lengths in zip(segment, rows, strict=True):
        row[: sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return segment


def draw(segment: np.ndarray, kv_heads: int, group: int, head: int, dtype: str) -> list[jax.Array]:
    """Query, key, value and the gradient of the result."""
    shapes = [(*segment.shape, kv_heads, *axes, head) for axes in ((group,), (), (), (group,))]
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def formula(segment: np.ndarray, *arrays: jax.Array) -> list[np.ndarray]:
    """The result and its gradients by query, key and value in float64, document by document."""
    query, key, value, gradient = (np.asarray(x.astype(jnp.float32), np.float64) for x in arrays)
    results = [np.zeros_like(x) for x in (query, query, key, value)]
    for row, ids in enumerate(segment):
        for document in np.unique(ids):
            here = row, ids == document
            q, k, v, g = query[here], key[here], value[here], gradient[here]
            scale = q.shape[-1] ** -0.5
            scores = np.einsum("tkgh,skh->kgts", q, k) * scale + np.where(np.tri(len(q)), 0, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            slope = np.einsum("tkgh,skh->kgts", g, v)
            slope = weights * (slope - np.sum(weights * slope, -1, keepdims=True)) * scale
            results[0][here] = np.einsum("kgts,skh->tkgh", weights, v)
            results[1][here] = np.einsum("kgts,skh->tkgh", slope, k)
            results[2][here] = np.einsum("kgts,tkgh->skh", slope, q)
            results[3][here] = np.einsum("kgts,tkgh->skh", weights, g)
    return results


def check(attend: Callable[..., jax.Array], segment: np.ndarray, arrays: list[jax.Array]) -> None:
    """Result and gradients of all but padding are those of the formula, to the rounding of the dtype."""
    query, key, value, gradient = arrays

    def run(query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
        mixed, pull = jax.vjp(partial(attend, segment=jnp.asarray(segment)), query, key, value)
        return mixed, *pull(gradient)

    for ours, wanted in zip(jax.jit(run)(query, key, value), formula(segment, *arrays), strict=True):
        assert ours.dtype == query.dtype
        ours, wanted = (np.asarray(x.astype(jnp.float32))[segment > 0] for x in (ours, wanted))
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=TOLERANCE[str(query.dtype)] * np.abs(wanted).max())


SHAPES = [("ragged", 2, 3, 64), ("blocks", 1, 2, 128), ("short", 2, 1, 8)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "kv_heads", "group", "head"), SHAPES)
def test_xla_is_the_formula(rows: str, kv_heads: int, group: int, head: int, dtype: str) -> None:
    segment = segments(*ROWS[rows])
    check(attention.xla_attention, segment, draw(segment, kv_heads, group, head, dtype))


def test_completions_attend_to_their_prompt_as_if_it_preceded_each() -> None:
    """A row of two prompts with completions and a document alone, one of one prompt, and one of padding."""
    lengths = [[70, 90, 33, 140, 20, 5, 15, 60], [9, 200, 190], []]
    distances = [[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 2], []]
    shared, prompt_offset = segments(450, lengths), segments(450, lengths)
    query, key, value, gradient = draw(shared, 2, 2, 64, "float32")
    wanted = [np.zeros(x.shape) for x in (query, query, key, value)]
    for row, (parts, back) in enumerate(zip(lengths, distances, strict=True)):
        begin = np.cumsum([0, *parts])
        prompt_offset[row, : begin[-1]] = np.repeat(back, parts)
        for number, distance in enumerate(back):
            own = np.arange(begin[number], begin[number + 1])
            prompt = np.arange(begin[number - distance], begin[number - distance + 1]) if distance else own[:0]
            place = np.concatenate([prompt, own])
            arrays = [np.asarray(x)[row : row + 1, place] for x in (query, key, value, gradient)]
            arrays[3][:, : len(prompt)] = 0
            alone = formula(np.ones((1, len(place)), np.int32), *map(jnp.asarray, arrays))
            wanted[0][row, own] = alone[0][0, len(prompt) :]
            for sums, part in zip(wanted[1:], alone[1:], strict=True):
                sums[row, place] += part[0]
    attend = partial(attention.xla_attention, segment=jnp.asarray(shared), prompt_offset=jnp.asarray(prompt_offset))
    mixed, pull = jax.vjp(attend, query, key, value)
    for ours, expected in zip((mixed, *pull(gradient)), wanted, strict=True):
        ours = np.where((shared > 0).reshape(3, 450, *[1] * (ours.ndim - 2)), ours, 0)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("rows", "kv_heads", "group", "head", "dtype"), [
    ("ragged", 1, 2, 64, "float32"), ("blocks", 2, 1, 128, "bfloat16"),
])  # fmt: skip
def test_splash_kernel_interpreted_is_the_formula(rows: str, kv_heads: int, group: int, head: int, dtype: str) -> None:
    segment = segments(*ROWS[rows])
    arrays = draw(segment, kv_heads, group, head, dtype)
    check(partial(attention.splash_attention, interpret=True), segment, arrays)


# cuDNN's kernel runs only on its GPUs; here a plain function plays it, as its interface is documented


@pytest.mark.parametrize("name", [
    "dot_product_attention", "_dot_product_attention_bwd_p_wrapper", "MaskType.PADDING_CAUSAL", "AttentionLayout.BTNH",
    "check_compute_capability", "is_cuda_compute_capability_equal",
])  # fmt: skip
def test_jax_still_has_the_private_name(name: str) -> None:
    """What `attention` and `plan` use of jax._src.cudnn.fused_attention_stablehlo."""
    assert operator.attrgetter(name)(fused_attention)


def kernel(query: jax.Array, key: jax.Array, value: jax.Array, places: Any, scale: float) -> jax.Array:
    """Causal attention of each document that the places name; nan where they name none."""
    lengths, kv_lengths, offsets, kv_offsets = places
    token = jnp.arange(query.shape[1])

    def named(offsets: jax.Array, lengths: jax.Array) -> jax.Array:
        first = offsets[:, :-1, None]
        inside = (first >= 0) & (token >= first) & (token < first + lengths[..., None])
        return jnp.where(inside.any(axis=1), jnp.argmax(inside, axis=1), -1)

    here, there = named(offsets, lengths), named(kv_offsets, kv_lengths)
    visible = (here[:, :, None] == there[:, None]) & (token[:, None] >= token) & (here >= 0)[:, :, None]
    scores = jnp.where(visible[:, None], jnp.einsum("btnh,bsnh->bnts", query, key) * scale, -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1), value)


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of the kernel."""
    calls = []

    def forward(query: Any, key: Any, value: Any, bias: None, mask: None, *places: Any, **named: Any) -> Any:
        assert query.shape == key.shape == value.shape and named["mask_type"].name == "PADDING_CAUSAL"
        statistics = jnp.zeros((query.shape[0] * places[0].shape[1], query.shape[2], query.shape[1]))
        calls.append("forward")
        return kernel(query, key, value, places, named["scale"]), statistics

    def backward(
        query: Any, key: Any, value: Any, _bias: Any, *rest: Any, scale: float, mask_type: Any, **_named: Any
    ) -> Any:
        assert query.shape == key.shape and mask_type.name == "PADDING_CAUSAL"
        *places, _, _, _, _, gradient = rest
        calls.append("backward")
        return jax.vjp(partial(kernel, places=places, scale=scale), query, key, value)[1](gradient)

    monkeypatch.setattr(fused_attention, "dot_product_attention", forward)
    monkeypatch.setattr(fused_attention, "_dot_product_attention_bwd_p_wrapper", SimpleNamespace(bind=backward))
    return calls


@pytest.mark.parametrize("rows", ["ragged", "short"])
def test_cudnn_gets_every_document(rows: str, cudnn: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "xla_attention", lambda query, key, value, segment: query * jnp.nan)
    segment = segments(*ROWS[rows])
    check(attention.cudnn_attention, segment, draw(segment, 2, 3, 16, "float32"))
    assert set(cudnn) == {"forward", "backward"}


def test_xla_takes_over_where_cudnn_has_no_room(cudnn: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MOST_DOCUMENTS", 3)
    segment = segments(40, [[20, 20], [5, 10, 15]])  # and ten of padding are a fourth
    check(attention.cudnn_attention, segment, draw(segment, 1, 2, 8, "float32"))


def test_document_bounds_are_lengths_and_first_tokens() -> None:
    segment = jnp.array([[1, 1, 2, 0, 0], [1, 2, 3, 4, 5]])
    lengths, offsets = attention.document_bounds(segment, 5)
    assert lengths.tolist() == [[2, 1, 2, -1, -1], [1, 1, 1, 1, 1]]
    assert offsets.tolist() == [[0, 2, 3, -1, -1, -1], [0, 1, 2, 3, 4, -1]]


# What is never computed


def test_no_score_array_of_a_whole_row_exists() -> None:
    length = 2048
    shapes = [jax.ShapeDtypeStruct((1, length, *axes, 16), jnp.float32) for axes in ((1, 1), (1,), (1,))]
    segment = jax.ShapeDtypeStruct((1, length), jnp.int32)
    gradient = jax.grad(lambda *arrays: jnp.sum(attention.xla_attention(*arrays)), (0, 1, 2))
    memory = jax.jit(gradient).lower(*shapes, segment).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < length * length


def test_blocks_of_other_documents_are_skipped() -> None:
    """A nan in a skipped block does no harm; in a masked one it would."""
    segment = segments(512, [[256, 256]])
    query, key, value, gradient = draw(segment, 1, 1, 8, "float32")
    key = key.at[:, :256].set(jnp.nan)
    mixed, pull = jax.vjp(partial(attention.xla_attention, segment=jnp.asarray(segment)), query, key, value)
    assert np.isfinite(mixed[:, 256:]).all()
    assert all(np.isfinite(x[:, 256:]).all() for x in pull(gradient))


def test_rows_and_heads_over_devices_change_nothing() -> None:
    segment = segments(200, [[120, 50], [200], [1, 2, 3], [90, 90]])
    query, key, value, _ = draw(segment, 2, 2, 8, "float32")
    attend = jax.jit(partial(attention.attention, backend="xla"))
    alone = attend(query, key, value, segment)
    with jax.set_mesh(mesh_of(2, 2, 2)):
        np.testing.assert_array_equal(attend(query, key, value, segment), alone)


# Compiled for hardware that is not here

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("no jax[cuda13]")
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    monkeypatch.setattr(fused_attention, "check_compute_capability", lambda least: float(least) <= 9.0)
    monkeypatch.setattr(fused_attention, "is_cuda_compute_capability_equal", lambda exact: float(exact) == 9.0)
    return topologies.get_topology_desc(platform="cuda", topology_name="", topology="1x1x8", target_config=H100).devices


@pytest.fixture
def tpus(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("no libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices


def program(devices: list[Any], backend: str, length: int, head: int, dtype: str) -> str:
    """The compiled gradient of attention in rows over four groups of devices and heads over two."""
    mesh = Mesh(np.array(devices).reshape(1, 4, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    heads = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    shapes = [jax.ShapeDtypeStruct((4, length, 2, *axes, head), dtype, sharding=heads) for axes in ((3,), (), ())]
    segment = jax.ShapeDtypeStruct((4, length), jnp.int32, sharding=rows)

    def loss(*arrays: jax.Array) -> jax.Array:
        return jnp.sum(attention.attention(*arrays, backend=backend).astype(jnp.float32) ** 2)

    with jax.set_mesh(mesh):
        return str(jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes, segment).compile().as_text())


@pytest.mark.parametrize(("length", "head"), [(1024, 64), (1001, 128)])
def test_cudnn_compiles_for_hopper_forward_and_backward(gpus: list[Any], length: int, head: int) -> None:
    text = program(gpus, "cudnn", length, head, "bfloat16")
    for call in ('"__cudnn$fmhaSoftmax"', '"__cudnn$fmhaSoftmaxBackward"'):
        lines = [line for line in text.splitlines() if f"custom_call_target={call}" in line]
        assert lines and all(
            f'"max_seg_per_batch":{attention.MOST_DOCUMENTS}' in line.replace(" ", "") for line in lines
        )
        assert all('"mask_type":"PADDING_CAUSAL"' in line.replace(" ", "") for line in lines)


@pytest.mark.parametrize(("length", "head", "dtype"), [(1024, 128, "bfloat16"), (1001, 64, "float32")])
def test_splash_compiles_for_tpu_forward_and_backward(tpus: list[Any], length: int, head: int, dtype: str) -> None:
    text = program(tpus, "splash", length, head, dtype)
    for name in ("splash_mha_fwd_segmented", "splash_mha_dq_segmented", "splash_mha_dkv_segmented"):
        assert name in text


# The choice


def chosen(device: Any, head: int = 64, **keys: Any) -> tuple[str, str]:
    mesh = Mesh(np.array([device], object), ("data",))
    return attention.choose_backend(ModelKeys(model_name="x", **keys), mesh, head)


@dataclass(frozen=True)
class Device:
    platform: str
    device_kind: str
    compute_capability: str = ""


CPU, TPU = Device("cpu", "cpu"), Device("tpu", "TPU v5 lite")
HOPPER, BLACKWELL = Device("gpu", "NVIDIA H100", "9.0"), Device("gpu", "NVIDIA B200", "10.0")
AMPERE, RADEON = Device("gpu", "NVIDIA A100", "8.0"), Device("gpu", "MI300", "gfx942")


@pytest.mark.parametrize(
    ("device", "keys", "backend", "words"),
    [
        (CPU, {}, "xla", "attention: XLA, in blocks"),
        (TPU, {}, "splash", "attention: splash kernel"),
        (HOPPER, {}, "cudnn", "attention: cuDNN, packed rows"),
        (BLACKWELL, {}, "cudnn", "attention: cuDNN, packed rows"),
        (AMPERE, {}, "xla", "in blocks (cuDNN's packed form needs Hopper or newer, and this is NVIDIA A100)"),
        (RADEON, {}, "xla", "this is MI300"),
        (HOPPER, {"compute_dtype": "float32"}, "xla", "needs bfloat16, and compute_dtype is float32"),
        (HOPPER, {"head": 12}, "xla", "the model's are 12"),
        (HOPPER, {"attention": "xla"}, "xla", "attention: XLA, in blocks"),
    ],
)
def test_the_backend_follows_from_the_device(device: Any, keys: dict[str, Any], backend: str, words: str) -> None:
    found, line = chosen(device, **keys)
    assert found == backend
    assert line.endswith(words) if "attention: " in words else words in line


@pytest.mark.parametrize(
    ("device", "keys", "words"),
    [
        (CPU, {"attention": "cudnn"}, "attention = cudnn: cuDNN runs on NVIDIA GPUs, and this is cpu"),
        (
            HOPPER,
            {"attention": "splash"},
            "attention = splash: the splash kernel runs on TPUs, and this is NVIDIA H100",
        ),
        (AMPERE, {"attention": "cudnn"}, "needs Hopper or newer"),
        (HOPPER, {"attention": "cudnn", "compute_dtype": "float32"}, "compute_dtype is float32"),
    ],
)
def test_a_backend_that_cannot_run_is_refused(device: Any, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match="set attention to auto or xla") as refusal:
        chosen(device, **keys)
    assert words in str(refusal.value)
