"""Plans: what is read from compiled programs against known ones, and whole plans on virtual devices."""

import io
import json
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from conftest import SIZES, TINY, make_small, mesh_of
from jax.sharding import NamedSharding, PartitionSpec

from lacuna import cli
from lacuna.apps import plan
from lacuna.apps.configs import GrpoPlan, PretrainPlan
from lacuna.apps.plan import CHIPS, Program, TooLarge, Topology, read_topology, tracing_for
from lacuna.apps.programs import (
    Collective,
    collectives,
    first_group,
    matmul_flops,
    moved_bytes,
    read_program,
    recomputed_flops,
    runs_of,
    shape_bytes,
)
from lacuna.attention import fused_attention
from lacuna.checkpoint import at, model_on
from lacuna.cli import DEVICE_MEMORY_SHARE
from lacuna.config import TrainingConfig, UserError
from lacuna.metrics import byte_size
from lacuna.model import PAGE

RUN = ["--from-scratch", "--run-name", "planned", "--data.0.path", "unread.jsonl", "--topology", "h100:8"]
H100 = 989e12, 3.35e12, 450e9  # FLOP/s, bytes/s of its memory and of its links, as NVIDIA publishes them


def text_of(function: Any, *arguments: Any, **options: Any) -> str:
    return str(jax.jit(function, **options).lower(*arguments).compile().as_text())


def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize(("is_donated", "size"), [(False, 8010), (True, 4010)])
def test_a_program_holds_arguments_results_and_what_lies_beside_it(is_donated: bool, size: int) -> None:
    doubled = jax.jit(lambda x: x * 2, donate_argnums=(0,) if is_donated else ())
    program = plan.compiled("double", "", doubled, shape(1000), beside=10.0)
    assert program.bytes == size


def test_sizes_of_arrays_and_tuples() -> None:
    assert shape_bytes("f32[2,3]{1,0}") == 24 and shape_bytes("(bf16[8]{0:T(8,128)(2,1)}, pred[3], s4[6], u32[])") == 26


def test_flops_count_every_round_of_a_scan_and_what_is_recomputed() -> None:
    def chain(weights: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, weight: (jnp.sin(x @ weight), None), x, weights)[0].sum()

    def backward(body: Any) -> float:
        return matmul_flops(jax.make_jaxpr(jax.grad(body))(shape(5, 16, 16), shape(4, 16)).jaxpr)

    one = 2 * 4 * 16 * 16
    assert matmul_flops(jax.make_jaxpr(chain)(shape(5, 16, 16), shape(4, 16)).jaxpr) == 5 * one
    assert backward(chain) == 3 * 5 * one
    assert backward(jax.checkpoint(chain)) == 4 * 5 * one


def test_a_loop_of_unknown_length_counts_once_and_one_inside_it_as_often_as_asked() -> None:
    def product(_: Any, x: jax.Array) -> jax.Array:
        return jnp.sin(x @ x)

    def looped(x: jax.Array, count: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, count, lambda _, x: jax.lax.fori_loop(0, count, product, product(0, x)), x)

    traced, one = jax.jit(looped).trace(shape(16, 16), shape(dtype=jnp.int32)), 2 * 16**3
    assert matmul_flops(traced.jaxpr.jaxpr) == 2 * one
    assert matmul_flops(traced.jaxpr.jaxpr, nested_rounds=0) == one
    assert set(runs_of(read_program(str(traced.lower().compile().as_text()))).values()) == {1}


def test_loops_run_as_often_as_their_condition_says() -> None:
    def looped(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 7, lambda _, x: jnp.cumsum(x) @ jnp.ones((64, 64)), x)

    program = read_program(text_of(looped, shape(64)))
    assert 7 in runs_of(program).values()


def test_an_elementwise_program_moves_what_it_reads_and_writes() -> None:
    assert moved_bytes(read_program(text_of(lambda x, y: jnp.sin(x) + y, shape(1000), shape(1000)))) == 12_000


def test_a_slice_counts_as_what_is_read_of_it() -> None:
    def updated(x: jax.Array, row: jax.Array, at: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(x, row, (at, 0))

    text = text_of(updated, shape(1000, 100), shape(1, 100), shape(dtype=jnp.int32), donate_argnums=0)
    assert moved_bytes(read_program(text)) < 4000


def test_a_slice_that_is_first_looked_at_in_another_shape_counts_the_same() -> None:
    text = """
%fused (p: f32[10,100], at: s32[]) -> f32[1,100] {
  %p = f32[10,100]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  %flat = f32[10,1,100]{2,1,0} bitcast(%p)
  ROOT %row = f32[1,1,100]{2,1,0} dynamic-slice(%flat, %at, %zero, %zero), dynamic_slice_sizes={1,1,100}
}

ENTRY %main (x: f32[10,100], at: s32[]) -> f32[1,100] {
  %x = f32[10,100]{1,0} parameter(0)
  %at = s32[] parameter(1)
  ROOT %out = f32[1,1,100]{2,1,0} fusion(%x, %at), kind=kLoop, calls=%fused
}
"""
    assert moved_bytes(read_program(text)) == 400 + 400 + 4


def test_what_stays_on_the_chip_or_is_only_passed_on_is_not_moved() -> None:
    text = """
%fused (p: f32[100], q: f32[50]) -> (f32[100], f32[50]) {
  %p = f32[100]{0} parameter(0)
  %q = f32[50]{0:T(128)S(1)} parameter(1)
  %sine = f32[50]{0:T(128)} sine(%q)
  ROOT %both = (f32[100]{0}, f32[50]{0:T(128)}) tuple(%p, %sine)
}

ENTRY %main (x: f32[100], y: f32[50]) -> (f32[100], f32[50]) {
  %x = f32[100]{0} parameter(0)
  %y = f32[50]{0:T(128)S(1)} parameter(1)
  ROOT %out = (f32[100]{0}, f32[50]{0:T(128)}) fusion(%x, %y), kind=kLoop, calls=%fused
}
"""
    assert moved_bytes(read_program(text)) == 200


def test_of_branches_the_one_that_makes_least_is_counted() -> None:
    def either(flag: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.cond(flag, lambda: jnp.sort(jnp.tile(jnp.sin(x), 50))[:1000], lambda: x)

    assert moved_bytes(read_program(text_of(either, shape(dtype=jnp.bool_), shape(1000)))) < 50_000


def test_products_that_the_compiler_does_again_are_counted_once_each() -> None:
    text = """
%fused (p: bf16[8,16], q: bf16[16,4]) -> f32[8,4] {
  %p = bf16[8,16]{1,0} parameter(0)
  %q = bf16[16,4]{1,0} parameter(1)
  ROOT %product = f32[8,4]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
ENTRY %main (x: bf16[8,16], y: bf16[16,4]) -> f32[8,4] {
  %x = bf16[8,16]{1,0} parameter(0)
  %y = bf16[16,4]{1,0} parameter(1)
  %gemm.1 = f32[8,4]{1,0} fusion(%x, %y), kind=kCustom, calls=%fused
  %gemm.1.remat3 = f32[8,4]{1,0} fusion(%x, %y), kind=kCustom, calls=%fused
  %gemm.2.remat = f32[8,4]{1,0} fusion(%x, %y), kind=kCustom, calls=%fused
  ROOT %out = f32[8,4]{1,0} add(%gemm.1.remat3, %gemm.2.remat)
}
"""
    assert recomputed_flops(read_program(text)) == 2 * 8 * 16 * 4


@pytest.mark.parametrize(("between", "is_hidden"), [("negate", False), ("dot", True)])
def test_a_collective_is_hidden_only_beside_a_matrix_product(between: str, is_hidden: bool) -> None:
    text = f"""
%fused (p: f32[8,8]) -> f32[8,8] {{
  %p = f32[8,8]{{1,0}} parameter(0)
  ROOT %made = f32[8,8]{{1,0}} {between}(%p, %p)
}}

ENTRY %main (x: f32[8,8]) -> f32[32,8] {{
  %x = f32[8,8]{{1,0}} parameter(0)
  %begun = (f32[8,8]{{1,0}}, f32[32,8]{{1,0}}) all-gather-start(%x), replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}
  %work = f32[8,8]{{1,0}} fusion(%x), kind=kLoop, calls=%fused
  ROOT %ended = f32[32,8]{{1,0}} all-gather-done(%begun)
}}
"""
    (found,) = collectives(read_program(text), 4)
    assert found.is_overlapped is is_hidden and found.bytes == 3 * 8 * 8 * 4


def test_a_collective_that_is_spread_over_fusions_is_one() -> None:
    text = """
%part (p: f32[8]) -> f32[32] {
  %p = f32[8]{0} parameter(0)
  ROOT %all = f32[32]{0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
}

ENTRY %main (x: f32[8]) -> f32[32] {
  %x = f32[8]{0} parameter(0)
  %begun = f32[32]{0} fusion(%x), kind=kCustom, calls=%part
  ROOT %ended = f32[32]{0} fusion(%x), kind=kCustom, calls=%part
}
"""
    assert [(each.count, each.bytes) for each in collectives(read_program(text), 4)] == [(1, 3 * 8 * 4)]


@pytest.mark.parametrize("kind", ["all-gather", "all-reduce"])
def test_collectives_are_counted_with_their_bytes(kind: str) -> None:
    mesh = mesh_of(1, 8, 1)
    sharded, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("fsdp",), ()))

    def talk(x: jax.Array) -> jax.Array:
        return x * 2 if kind == "all-gather" else jnp.sum(x.reshape(8, 1000), axis=0)

    text = text_of(talk, jax.ShapeDtypeStruct((8000,), jnp.float32, sharding=sharded), out_shardings=whole)
    found = collectives(read_program(text), 8)
    assert [(each.kind, each.group, each.count) for each in found] == [(kind, 8, 1)]
    assert found[0].bytes == {"all-gather": 8000 * 4 * 7 / 8, "all-reduce": 2 * 1000 * 4 * 7 / 8}[kind]


@pytest.mark.parametrize(
    ("text", "devices"),
    [("replica_groups={{0,8},{1,9}}", [0, 8]), ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
     ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]), ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [0, 4]),
     ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", list(range(8))),
     ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, dimensions={0}", [0, 1, 2, 3]),
     ("replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'c'}, dimensions={0}", [0, 4])],
)  # fmt: skip
def test_who_talks_to_whom_is_read_in_every_notation(text: str, devices: list[int]) -> None:
    assert first_group(text, 16) == devices


@pytest.mark.parametrize(
    ("group", "reach", "bandwidth"), [(8, 8, 450e9), (64, 64, 400e9), (8, 57, 50e9), (32, 125, 100e9)]
)
def test_a_group_sends_through_the_network_cards_of_its_devices(group: int, reach: int, bandwidth: float) -> None:
    talk = Collective("all-gather", group, reach, is_overlapped=False, count=1, bytes=1e9)
    assert plan.reached_bandwidth(talk, CHIPS["h100"]) == bandwidth


class Planned(NamedTuple):
    """What a plan wrote and printed."""

    facts: dict[str, Any]
    printed: str


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def virtual() -> Iterator[None]:
    """Eight devices of this machine as if they were H100s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "read_topology", lambda _: Topology("h100:8", CHIPS["h100"], jax.devices()))
        yield


def planned(command: str, model: Path, *options: str) -> Planned:
    file, printed = model / "plan.json", io.StringIO()
    with redirect_stdout(printed):
        cli.start("plan", [command, "--model-name", str(model), *RUN, "--plan-file", str(file), *options])
    return Planned(json.loads(file.read_text()), printed.getvalue())


SFT_SIZES = ["--sequence-length", "64", "--batch-size", "16", "--micro-batch-size", "1"]


@pytest.fixture(scope="module")
def sft_plan(virtual: None, small_model: Path) -> Planned:
    return planned("sft", small_model, *SFT_SIZES)


@pytest.fixture(scope="module")
def grpo_plan(virtual: None, small_model: Path) -> Planned:
    return planned(
        "grpo", small_model, "--sequence-length", "128", "--max-completion-tokens", "64", "--slots", "8",
        "--prompts-per-step", "4", "--updates-per-rollout", "2", "--kl-weight", "0.1", "--no-search",
    )  # fmt: skip


def matmul_parameters(model: Path) -> int:
    """Weights that a token is multiplied with, the tied embedding once, as the head."""
    raw = json.loads((model / "config.json").read_text())
    embed, head = raw["hidden_size"], raw["head_dim"]
    attention = embed * head * (2 * raw["num_attention_heads"] + 2 * raw["num_key_value_heads"])
    layer = attention + 3 * embed * raw["intermediate_size"]
    return raw["num_hidden_layers"] * layer + raw["vocab_size"] * embed


def model_flops(model: Path, rows: int, length: int) -> float:
    raw = json.loads((model / "config.json").read_text())
    width = raw["num_attention_heads"] * raw["head_dim"]
    return rows * (6 * matmul_parameters(model) * length + 6 * raw["num_hidden_layers"] * width * length**2)


def test_a_plan_of_sft_adds_up(sft_plan: Planned, small_model: Path) -> None:
    facts, step = sft_plan.facts, sft_plan.facts["programs"][0]
    layers, embed, head = SIZES["num_hidden_layers"], SIZES["hidden_size"], SIZES["head_dim"]
    sharded, whole = matmul_parameters(small_model) + (2 * layers + 1) * embed, 2 * layers * head  # whole: of heads
    assert facts["parameters"] == sharded + whole
    assert facts["parameter_bytes"] == 4 * (sharded / 8 + whole)
    assert facts["optimizer_bytes"] == pytest.approx(2 * facts["parameter_bytes"], rel=1e-3)
    assert facts["gradient_bytes"] == facts["parameter_bytes"]
    batch = 5 * 4 * 16 * 64 / 8
    assert step["argument_bytes"] == pytest.approx(3 * facts["parameter_bytes"] + batch, rel=0.01)
    assert step["bytes"] == pytest.approx(step["argument_bytes"] + step["temporary_bytes"], rel=0.01)
    assert facts["model_flops"] == model_flops(small_model, 16, 64)
    assert 0 <= facts["recomputed_share"] < 0.1 and step["compiler_recomputed_flops"] == 0
    assert step["flops"] == pytest.approx((1 + facts["recomputed_share"]) * facts["model_flops"] / 8)


def test_the_least_step_is_that_of_the_published_figures(sft_plan: Planned) -> None:
    facts, step = sft_plan.facts, sft_plan.facts["programs"][0]
    flops, memory, link = H100
    sent = {
        is_overlapped: sum(
            each["bytes"] for each in step["collectives"] if each["is_overlapped"] == is_overlapped
        ) / link
        for is_overlapped in (False, True)
    }  # fmt: skip
    assert sent[False] > 0 and {each["kind"] for each in step["collectives"]} >= {"all-gather"}
    least = max(step["flops"] / flops, step["moved_bytes"] / memory, sent[True]) + sent[False]
    assert step["seconds"] == pytest.approx(least)
    assert facts["tokens_per_second"] == pytest.approx(16 * 64 / least)
    assert facts["mfu"] == pytest.approx(facts["model_flops"] / (least * 8 * flops))
    assert step["compute_seconds"] == pytest.approx(step["flops"] / flops)
    assert step["memory_seconds"] == pytest.approx(step["moved_bytes"] / memory)


def test_a_plan_prints_what_it_writes(sft_plan: Planned) -> None:
    facts, step = sft_plan.facts, sft_plan.facts["programs"][0]
    assert facts["fits"] and facts["advice"] == [
        "largest micro_batch_size that fits: 2, the largest that divides the batch"
    ]
    for line in (
        "8 × NVIDIA H100 80GB HBM3, mesh data 1 × fsdp 8 × tensor 1",
        f"{facts['parameters']:,} parameters",
        f"{byte_size(facts['parameter_bytes'])} of parameters, {byte_size(facts['optimizer_bytes'])} of optimizer",
        f"step: {byte_size(step['bytes'])} ({byte_size(step['argument_bytes'])} of arguments",
        "16 rows in 2 micro-batches, and the optimizer: compute",
        f"({byte_size(step['moved_bytes'])} moved)",
        f"no faster than {step['seconds']:.3g} s",
        f"{100 * facts['mfu']:.3g}% MFU",
        f"fits: step needs {byte_size(step['bytes'])} of the 79 GB that programs can have of 85.9 GB",
        facts["advice"][0],
    ):
        assert line in sft_plan.printed


def test_recomputation_shows(virtual: None, sft_plan: Planned, small_model: Path) -> None:
    layer = planned("sft", small_model, *SFT_SIZES, "--rematerialisation", "layer", "--no-search")
    again = layer.facts["recomputed_share"] - sft_plan.facts["recomputed_share"]
    down = SIZES["num_hidden_layers"] * SIZES["hidden_size"] * SIZES["intermediate_size"]  # whose result nobody needs
    head = json.loads((small_model / "config.json").read_text())["vocab_size"] * SIZES["hidden_size"]
    forward = model_flops(small_model, 16, 64) / 3 - 2 * 16 * 64 * (head + down)
    assert again == pytest.approx(forward / model_flops(small_model, 16, 64))


def test_a_plan_of_grpo_counts_what_lies_beside_each_program(grpo_plan: Planned, small_model: Path) -> None:
    facts = grpo_plan.facts
    prefill, decode, update = facts["programs"]
    assert [each["name"] for each in facts["programs"]] == ["prefill", "decode", "update"]
    pages = -(-128 // PAGE)
    cache = 2 * 2 * SIZES["num_hidden_layers"] * pages * PAGE * SIZES["num_key_value_heads"] * SIZES["head_dim"]
    assert facts["cache_bytes"] == cache  # a slot for each of eight devices, keys and values in bfloat16
    state, weights = facts["parameter_bytes"] + facts["optimizer_bytes"], 2 * matmul_parameters(small_model) / 8
    vocabulary = 5 * 512  # of a slot: whether each token was seen, and how often
    assert decode["beside_bytes"] == pytest.approx(state + weights, rel=0.02)
    assert prefill["beside_bytes"] == pytest.approx(state + weights + cache + vocabulary, rel=0.02)
    assert update["beside_bytes"] == pytest.approx(3 * weights + cache + vocabulary, rel=0.02)
    assert f"{byte_size(cache)} for 8 completions at once" in grpo_plan.printed


def test_the_update_of_grpo_is_counted_for_one_of_its_micro_batches(grpo_plan: Planned, small_model: Path) -> None:
    update = grpo_plan.facts["programs"][-1]
    assert update["scope"] == "one micro-batch of 8 rows, of up to 2, and the optimizer"
    assert update["scope"] in grpo_plan.printed
    assert 1 <= 8 * update["flops"] / model_flops(small_model, 8, 128) < 1.1
    batch = 12 * 4 * 2 * 128  # both micro-batches of one device, each of twelve arrays
    state = grpo_plan.facts["parameter_bytes"] + grpo_plan.facts["optimizer_bytes"]
    assert update["argument_bytes"] == pytest.approx(state + batch, rel=0.01)


class Nothing:
    """The memory of a compiled program whose bytes all lie beside it."""

    argument_size_in_bytes = output_size_in_bytes = alias_size_in_bytes = temp_size_in_bytes = 0

    def memory_analysis(self) -> "Nothing":
        return self


def advice_for(gigabytes: float, config: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is advised on one device, where a row takes 4, 2 or 1 GB by what is kept, a completion 0.1 GB."""

    def programs_of(config: TrainingConfig, *_: object) -> list[Program]:
        update = config.micro_batch_size * {"none": 4e9, "matmuls": 2e9, "layer": 1e9}[config.rematerialisation]
        rows = config.micro_batch_size if isinstance(config, GrpoPlan) else 8
        flops = rows * (4.0 if config.rematerialisation == "layer" else 3.0)
        if not isinstance(config, GrpoPlan):
            return [Program("step", "", Nothing(), flops, 0, update)]
        cache = 0.1e9 * min(config.slots, config.prompts_per_step * config.completions_per_prompt)
        return [
            Program("decode", "", Nothing(), 1, 0, cache),
            Program("update", "", Nothing(), flops, 0, cache + update),
        ]

    chip, mesh = CHIPS["h100"]._replace(memory=gigabytes * 1e9 / DEVICE_MEMORY_SHARE), mesh_of(1, 1, 1)
    monkeypatch.setattr(plan, "programs_of", programs_of)
    topology, model = Topology("h100:1", chip, jax.devices()[:1]), model_on(at(TINY), config, mesh)[0]
    return list(plan.advice(config, model, topology, mesh, programs_of(config)))


@pytest.mark.parametrize(
    ("gigabytes", "expected"),
    [(17, "it fits with micro_batch_size = 4"), (5, "it fits with micro_batch_size = 1"),
     (3, "it fits with micro_batch_size = 1, rematerialisation = matmuls"),
     (1.5, "it fits with micro_batch_size = 1, rematerialisation = layer, which computes 33.3% more"),
     (0.5, "nothing that plan tries makes it fit on h100:1; try more devices, or a smaller model")],
)  # fmt: skip
def test_the_cheapest_change_is_named_with_its_cost(
    gigabytes: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PretrainPlan(model_name="x", run_name="x", data=({"path": "x"},), topology="h100:1", batch_size=8,
                        micro_batch_size=8, rematerialisation="none")  # fmt: skip
    assert advice_for(gigabytes, config, monkeypatch) == [expected]


@pytest.mark.parametrize(
    ("gigabytes", "expected"),
    [(9, "micro_batch_size = 1"), (7.5, "micro_batch_size = 2, slots = 32, whose decoding"),
     (6, "micro_batch_size = 1, slots = 32, whose decoding"),
     (4.5, "micro_batch_size = 1, rematerialisation = layer, slots = 32, which computes 33.3% more, whose decoding"),
     (3.7, "micro_batch_size = 2, rematerialisation = layer, slots = 16, which computes 33.3% more, whose decoding")],
)  # fmt: skip
def test_grpo_has_fewer_completions_at_once_before_it_computes_more(
    gigabytes: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GrpoPlan(model_name="x", run_name="x", data=({"path": "x"},), topology="h100:1", reward=("length:1.0",),
                    micro_batch_size=2, slots=512, prompts_per_step=8, completions_per_prompt=8)  # fmt: skip
    (advice,) = advice_for(gigabytes, config, monkeypatch)
    assert advice.startswith(f"it fits with {expected}")


@pytest.mark.parametrize("is_refused", [True, False])
def test_what_does_not_fit_says_what_would(
    is_refused: bool, virtual: None, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def programs_of(config: TrainingConfig, *_: object) -> list[Program]:
        if config.micro_batch_size > 1 and is_refused:
            raise TooLarge("step: RESOURCE_EXHAUSTED: out of memory")
        return [Program("step", "", Nothing(), 1, 0, 70e9 * config.micro_batch_size)]

    monkeypatch.setattr(plan, "programs_of", programs_of)
    monkeypatch.setattr(plan, "program_facts", lambda *_: {"seconds": 1.0, "flops": 1.0})
    monkeypatch.setattr(plan, "program_lines", lambda _: iter(()))
    sizes = "--sequence-length", "64", "--batch-size", "16", "--micro-batch-size", "2"
    facts, printed = planned("pretrain", small_model, *sizes)
    needs = "step: RESOURCE_EXHAUSTED" if is_refused else "step needs 140 GB of the 79 GB that programs can have"
    assert f"DOES NOT FIT: {needs}" in printed and "it fits with micro_batch_size = 1" in printed
    assert facts["fits"] is False and facts["advice"] == ["it fits with micro_batch_size = 1"]


def test_cudnn_is_traced_for_the_planned_gpu() -> None:
    before = fused_attention.check_compute_capability
    with tracing_for(Topology("rtx4090:1", CHIPS["rtx4090"], [])):
        assert fused_attention.check_compute_capability("8.9")
        assert not fused_attention.check_compute_capability("9.0")
        assert fused_attention.is_cuda_compute_capability_equal("8.9")
    assert fused_attention.check_compute_capability is before


@pytest.mark.parametrize(
    ("name", "why"),
    [("h900:8", "'h900' is none of a100"), ("h100:12", "whole nodes of 8"), ("h100", "give 1 to 8 GPUs"),
     ("v5e:5", "v5e comes as v5e:1, v5e:4"), ("v5p:2x2", "v5p comes as v5p:4")],
)  # fmt: skip
def test_a_topology_that_is_not_there_is_refused(name: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        read_topology(name)


def test_plan_needs_a_command_that_trains(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.start("plan", ["eval", "--topology", "h100:1"])
    assert "plan eval is not a command of lacuna; did you mean plan" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "kernel"), [("h200:8", "fmha"), ("v5e:4", "tpu_custom_call")])
def test_real_compilers_are_asked_where_they_are_installed(name: str, kernel: str, small_model: Path) -> None:
    try:
        topology = read_topology(name)
    except UserError as error:
        pytest.skip(str(error))
    mesh = plan.make_mesh(1, 0, 1, topology.devices)
    config = PretrainPlan(
        model_name="x", run_name="x", data=({"path": "x"},), topology=name, sequence_length=256, batch_size=8
    )
    model = replace(model_on(at(TINY), config, mesh)[0], layers=1)
    with tracing_for(topology):
        (step,) = plan.programs_of(config, model, mesh)
    facts = plan.program_facts(step, topology.chip, mesh.size)
    assert facts["bytes"] > 0 and facts["collectives"] and facts["flops"] > 0 and kernel in step.compiled.as_text()
