"""Plans: what is read from compiled programs against known ones, and a whole plan on virtual devices."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from conftest import TINY, mesh_of
from jax.sharding import NamedSharding, PartitionSpec

from lacuna import cli
from lacuna.apps import plan
from lacuna.apps.configs import GrpoPlan, PretrainPlan
from lacuna.apps.plan import CHIPS, Program, TooLarge, Topology, heard_of, read_topology
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
from lacuna.checkpoint import model_on
from lacuna.cli import DEVICE_MEMORY_SHARE
from lacuna.config import TrainingConfig, UserError

ROWS = ["--model-name", str(TINY), "--from-scratch", "--run-name", "planned", "--data.0.path", "unread.jsonl"]


def text_of(function: Any, *arguments: Any, **options: Any) -> str:
    return str(jax.jit(function, **options).lower(*arguments).compile().as_text())


def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


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


@pytest.fixture
def virtual(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight devices of this machine as if they were H100s."""
    topology = Topology("h100:8", CHIPS["h100"], jax.devices())
    monkeypatch.setattr(plan, "read_topology", lambda _: topology)


def test_a_plan_of_sft_adds_up(virtual: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    sizes = ["--sequence-length", "128", "--batch-size", "16", "--micro-batch-size", "1"]
    cli.start("plan", ["sft", *ROWS, *sizes, "--topology", "h100:8", "--plan-file", str(file)])
    facts, told = json.loads(file.read_text()), capsys.readouterr().out
    step = facts["programs"][0]
    assert facts["fits"] and "fits: step needs" in told and "largest micro_batch_size that fits: 2" in told
    assert facts["parameter_bytes"] * 8 == pytest.approx(facts["parameters"] * 4, rel=0.02)
    assert facts["optimizer_bytes"] == pytest.approx(2 * facts["parameter_bytes"], rel=1e-4)
    assert step["argument_bytes"] >= 3 * facts["parameter_bytes"]
    assert {each["kind"] for each in step["collectives"]} >= {"all-gather"}
    assert 0 <= facts["recomputed_share"] < 0.1
    assert step["seconds"] >= max(step["compute_seconds"], step["memory_seconds"])


def test_recomputation_shows(virtual: None, tmp_path: Path) -> None:
    share = {}
    for kind in ("none", "layer"):
        file = tmp_path / f"{kind}.json"
        sizes = ["--sequence-length", "64", "--batch-size", "8", "--rematerialisation", kind, "--no-search"]
        cli.start("plan", ["pretrain", *ROWS, *sizes, "--topology", "h100:8", "--plan-file", str(file)])
        share[kind] = json.loads(file.read_text())["recomputed_share"]
    assert share["layer"] > share["none"] + 0.2


def test_what_does_not_fit_says_what_would(
    virtual: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["pretrain", *ROWS, "--sequence-length", "128", "--batch-size", "32", "--micro-batch-size", "4",
                 "--topology", "h100:8", "--plan-file", str(tmp_path / "plan.json")]  # fmt: skip
    cli.start("plan", arguments)
    needed = json.loads((tmp_path / "plan.json").read_text())["programs"][0]["bytes"]
    small = Topology("h100:8", CHIPS["h100"]._replace(memory=0.9 * needed / DEVICE_MEMORY_SHARE), jax.devices())
    monkeypatch.setattr(plan, "read_topology", lambda _: small)
    capsys.readouterr()
    cli.start("plan", arguments)
    told = capsys.readouterr().out
    assert "DOES NOT FIT" in told and "it fits with micro_batch_size = 2" in told


class Nothing:
    """The memory of a compiled program whose bytes all lie beside it."""

    argument_size_in_bytes = output_size_in_bytes = alias_size_in_bytes = temp_size_in_bytes = 0

    def memory_analysis(self) -> "Nothing":
        return self


def advice_for(gigabytes: float, page: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is advised on one device, where a row takes 4, 2 or 1 GB by what is kept, a completion 0.1 GB."""

    def programs_of(page: TrainingConfig, *_: object) -> list[Program]:
        update = page.micro_batch_size * {"none": 4e9, "matmuls": 2e9, "layer": 1e9}[page.rematerialisation]
        rows = page.micro_batch_size if isinstance(page, GrpoPlan) else 8
        flops = rows * (4.0 if page.rematerialisation == "layer" else 3.0)
        if not isinstance(page, GrpoPlan):
            return [Program("step", Nothing(), flops, 0, update)]
        cache = 0.1e9 * min(page.slots, page.prompts_per_step * page.completions_per_prompt)
        return [Program("decode", Nothing(), 1, 0, cache), Program("update", Nothing(), flops, 0, cache + update)]

    chip = CHIPS["h100"]._replace(memory=gigabytes * 1e9 / DEVICE_MEMORY_SHARE)
    monkeypatch.setattr(plan, "programs_of", programs_of)
    topology, model = Topology("h100:1", chip, jax.devices()[:1]), model_on(TINY, page, mesh_of(1, 1, 1))[0]
    return list(plan.advice(page, model, topology, programs_of(page)))


@pytest.mark.parametrize(
    ("gigabytes", "told"),
    [(17, "it fits with micro_batch_size = 4"), (5, "it fits with micro_batch_size = 1"),
     (3, "it fits with micro_batch_size = 1, rematerialisation = matmuls"),
     (1.5, "it fits with micro_batch_size = 1, rematerialisation = layer, which computes 33.3% more"),
     (0.5, "nothing that plan tries makes it fit on h100:1; try more devices, or a smaller model")],
)  # fmt: skip
def test_the_cheapest_change_is_named_with_its_cost(
    gigabytes: float, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = PretrainPlan(model_name="x", run_name="x", data=({"path": "x"},), topology="h100:1", batch_size=8,
                        micro_batch_size=8, rematerialisation="none")  # fmt: skip
    assert advice_for(gigabytes, page, monkeypatch) == [told]


@pytest.mark.parametrize(
    ("gigabytes", "told"),
    [(9, "micro_batch_size = 1"), (7.5, "micro_batch_size = 2, slots = 32, whose decoding"),
     (6, "micro_batch_size = 1, slots = 32, whose decoding"),
     (4.5, "micro_batch_size = 1, rematerialisation = layer, slots = 32, which computes 33.3% more, whose decoding"),
     (3.7, "micro_batch_size = 2, rematerialisation = layer, slots = 16, which computes 33.3% more, whose decoding")],
)  # fmt: skip
def test_grpo_has_fewer_completions_at_once_before_it_computes_more(
    gigabytes: float, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = GrpoPlan(model_name="x", run_name="x", data=({"path": "x"},), topology="h100:1", reward=("length:1.0",),
                    micro_batch_size=2, slots=512, prompts_per_step=8, completions_per_prompt=8)  # fmt: skip
    (advice,) = advice_for(gigabytes, page, monkeypatch)
    assert advice.startswith(f"it fits with {told}")


def test_what_a_compiler_has_no_room_for_does_not_fit(
    virtual: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(page: TrainingConfig, *_: object) -> list[Program]:
        if page.micro_batch_size > 1:
            raise TooLarge("step: RESOURCE_EXHAUSTED: out of memory")
        return [Program("step", Nothing(), 1, 0, 1e9)]

    monkeypatch.setattr(plan, "programs_of", refused)
    sizes = ["--batch-size", "32", "--micro-batch-size", "4", "--sequence-length", "128"]
    sizes += ["--plan-file", str(tmp_path / "plan.json")]
    cli.start("plan", ["pretrain", *ROWS, *sizes, "--topology", "h100:8"])
    told = capsys.readouterr().out
    assert "DOES NOT FIT: step: RESOURCE_EXHAUSTED" in told and "it fits with micro_batch_size = 1" in told
    assert json.loads((tmp_path / "plan.json").read_text())["fits"] is False


def test_a_plan_of_grpo_counts_what_lies_beside_each_program(virtual: None, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    sizes = ["--sequence-length", "128", "--max-completion-tokens", "64", "--slots", "8", "--prompts-per-step", "2",
             "--no-search"]  # fmt: skip
    cli.start("plan", ["grpo", *ROWS, *sizes, "--topology", "h100:8", "--plan-file", str(file)])
    facts = json.loads(file.read_text())
    programs = {each["name"]: each for each in facts["programs"]}
    assert programs.keys() == {"prefill", "decode", "update", "optimizer"}
    state = facts["parameter_bytes"] + facts["optimizer_bytes"]
    assert programs["decode"]["beside_bytes"] == pytest.approx(state, rel=1e-3)
    assert programs["update"]["beside_bytes"] > state


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


@pytest.mark.parametrize("name", ["h200:8", "v5e:4"])
def test_real_compilers_are_asked_where_they_are_installed(name: str) -> None:
    try:
        topology = read_topology(name)
    except UserError as error:
        pytest.skip(str(error))
    mesh = plan.make_mesh(1, 0, 1, topology.devices)
    page = PretrainPlan(
        model_name="x", run_name="x", data=({"path": "x"},), topology=name, sequence_length=256, batch_size=8
    )
    config = replace(model_on(TINY, page, mesh)[0], layers=1)
    with heard_of(topology):
        programs = plan.programs_of(page, config, mesh)
    facts = plan.program_plan(programs[0], topology.chip, mesh.size)
    assert facts.bytes > 0 and facts.collectives and facts.flops > 0 and facts.kernels
